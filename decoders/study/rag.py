"""Retrieval in front of the prompt (RAG): BM25 over passages of the training text, with a new passage every `stride` tokens.

This is In-Context RALM (arXiv 2302.00083), the paper's baseline: the last `query` tokens before the stride are the query, the best passage
goes before the whole context, and the next `stride` tokens are scored.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdec.decoders.perplexity import SCORED, WINDOW, Floats, perplexity
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.passages import Passages, RagOptions
from memdec.decoders.train import fast_precision, progress

BATCH = 16
# Parameters are tuned one after the other, in this order.
CHOICES: tuple[tuple[str, tuple[int, ...]], ...] = (("passage", (64, 128, 256)), ("query", (16, 32, 64)), ("stride", (64, 32)))


@torch.inference_mode()
def rag_logprobs(model: PreTrainedModel, passages: Passages, ids: Ids, starts: Sequence[int], how: RagOptions, what: str) -> Floats:
    """Log p(token) of the tokens that `perplexity.score` scores, in its order, with a new passage for every stride."""
    device = next(model.parameters()).device
    precision = fast_precision(device)
    result = np.zeros((len(starts), SCORED))
    with progress(what, len(starts) * SCORED, " tokens") as bar:
        for offset in range(0, SCORED, how.stride):
            span = min(how.stride, SCORED - offset)
            end = WINDOW - SCORED + 1 + offset  # tokens of the window before the stride
            for group in range(0, len(starts), BATCH):
                part = starts[group : group + BATCH]
                fetched = passages.best([ids[s + end - how.query : s + end] for s in part])
                rows = np.stack([ids[s : s + end + span] for s in part])
                tokens = torch.from_numpy(np.concatenate([fetched, rows], 1).astype(np.int64)).to(device)
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    logits = model(input_ids=tokens[:, :-1], use_cache=False, logits_to_keep=span).logits.float()
                logprobs = logits.log_softmax(-1).gather(-1, tokens[:, -span:, None]).squeeze(-1)
                result[group : group + BATCH, offset : offset + span] = logprobs.double().cpu().numpy()
                bar.update(len(part) * span)
    return result.reshape(-1)


def tune_retrieval(
    model: PreTrainedModel, train: Ids, valid: Ids, starts: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[RagOptions, list[dict[str, Any]]]:
    """Tune passage length, query length and stride on validation windows; returns the best, and the perplexity of every choice tried."""
    best, lowest = RagOptions(), float("inf")
    tried: list[dict[str, Any]] = []
    indexes: dict[int, Passages] = {}
    for knob, values in CHOICES:
        for value in values:
            how = replace(best, **{knob: value})
            if any(row["how"] == how.to_dict() for row in tried):
                continue
            if how.passage not in indexes:
                indexes[how.passage] = Passages.build(train, tokenizer, how.passage)
            result = perplexity(rag_logprobs(model, indexes[how.passage], valid, starts, how, f"rag {knob} {value}"))
            tried.append({"how": how.to_dict(), "perplexity": round(result, 3)})
        chosen = min(tried, key=lambda row: row["perplexity"])
        best, lowest = RagOptions(**chosen["how"]), chosen["perplexity"]
    return best, [*tried, {"best": best.to_dict(), "perplexity": lowest}]
