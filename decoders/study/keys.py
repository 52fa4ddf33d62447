"""Compare two datastore keys: the input of the last block's MLP (the paper's code) and the final normed hidden state (ours).

    python -m memdec.decoders.study.keys WORK      # a build's work folder: tokens and teacher

Prints a line per key and one JSON line. Exhaustive search; k, tau and lambda tuned on the validation windows, measured on the test windows.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memdec.decoders.knn_lm import label_probability, tune
from memdec.decoders.models import load_model
from memdec.decoders.perplexity import SCORED, label_logprobs, perplexity
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.datastore import Datastore, with_exact_distances
from memdec.decoders.study.scores import NEIGHBOURS, Heldout
from memdec.decoders.tokens import load_tokens

ENTRIES, WINDOWS, SPAN, OVERLAP = 100_000, 32, 512, 128
Collect = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]


def final_state(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The final normed hidden states, [windows, T, width]."""
    hidden: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def mlp_input(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The input of the last block's MLP, [windows, T, width]."""
    seen: list[torch.Tensor] = []
    hook = model.base_model.layers[-1].mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.base_model(input_ids=tokens, use_cache=False)
    hook.remove()
    return seen[0]


@torch.inference_mode()
def keys_at(model: PreTrainedModel, collect: Collect, ids: Ids, starts: list[int], fresh: int) -> NDArray[np.float32]:
    """The last `fresh` keys of the windows at `starts`, [windows * fresh, width]."""
    parts = []
    for group in range(0, len(starts), 8):
        rows = np.stack([ids[s : s + SPAN] for s in starts[group : group + 8]]).astype(np.int64)
        parts.append(collect(model, torch.from_numpy(rows))[:, -fresh:].reshape(-1, model.config.hidden_size).float().numpy())
    return np.concatenate(parts)


def compare(work: Path) -> dict[str, Any]:
    """Measure the teacher's test perplexity with a kNN-LM on either key."""
    teacher, train = load_model(work / "teacher"), load_tokens(work / "tokens", "train")
    fresh = SPAN - OVERLAP
    starts = list(range(0, min(ENTRIES, len(train) - SPAN - 1), fresh))
    values = np.concatenate([train[s + OVERLAP + 1 : s + SPAN + 1] for s in starts])
    parts = {split: Heldout.open(work / "tokens", split, WINDOWS) for split in ("valid", "test")}
    base = {split: np.exp(label_logprobs(teacher, p.ids, split, p.starts)) for split, p in parts.items()}
    results: dict[str, Any] = {"entries": len(values), "teacher": round(perplexity(np.log(base["test"])), 3)}
    for name, collect in (("last MLP input", mlp_input), ("final hidden state", final_state)):
        keys = keys_at(teacher, collect, train, starts, fresh).astype(np.float16)
        store, near = Datastore(keys, values, with_exact_distances(None, keys)), {}
        for split, part in parts.items():
            distances, numbers = store.search(keys_at(teacher, collect, part.ids, part.starts, SCORED), max(NEIGHBOURS))
            near[split] = distances, store.values[numbers] == part.labels[:, None]
        best = tune(*near["valid"], base["valid"], NEIGHBOURS)
        p = label_probability(*near["test"], best.neighbours, best.tau)
        test = perplexity(np.log(best.lam * p + (1 - best.lam) * base["test"]))
        results[name] = {"k": best.neighbours, "tau": best.tau, "lambda": best.lam, "valid": best.perplexity, "test": round(test, 3)}
        print(f"{name}: {results[name]}", flush=True)
    return results


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
