"""The mixture computed the slow, obvious way with Hugging Face models, to compare vLLM's log-probabilities with."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from offline import Row
from transformers import AutoModelForCausalLM, PreTrainedModel

from memdec.decoders.models import attach_bias

FLOAT32 = 1e-4  # largest difference of a log-probability allowed, in nats
CODE = "def scale(self, x):\n    return x + 1\n"
MIX: list[Row] = [  # prompt, domain, lambda: all domains and none, every kind of lambda, prompts longer and shorter than a chunk
    (CODE * 8, None, 0.0),
    (CODE * 8, "a", 0.3),
    (CODE * 8, "b", 0.6),
    (CODE, "a", 1.0),
    (CODE[5:] * 7, "b", 0.0),
    (CODE[9:] * 6, "a", 0.6),
    ("import os", "b", 0.3),
]


@lru_cache
def hugging_face(folder: Path, stored: torch.dtype) -> PreTrainedModel:
    """A toy whose weights were rounded to `stored`, computing in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=stored).eval()
    attach_bias(model, folder)
    return model.float()


@torch.inference_mode()
def reference(toys: Path, kind: str, ids: list[int], domain: str | None, lam: float, stored: torch.dtype) -> torch.Tensor:
    """log(lambda * p_mem + (1 - lambda) * p_base) at every position, float64 [tokens, V]: the slow, obvious way."""
    tokens = torch.tensor([ids])
    base = hugging_face(toys / "base", stored)(tokens).logits[0].double().softmax(-1)
    if domain is not None:
        decoder = hugging_face(toys / f"{kind}_{domain}", stored)
        logits = decoder(tokens.clamp(max=decoder.config.vocab_size - 1)).logits[0].double()
        shared = min(base.shape[-1], logits.shape[-1])  # ids that only one of the two has are padding
        base = (1 - lam) * base
        base[:, :shared] += lam * logits[:, :shared].softmax(-1)
    logarithms: torch.Tensor = base.log()
    return logarithms


@torch.inference_mode()
def rounding_error(folder: Path, ids: list[int]) -> float:
    """Largest difference of a token's log-probability between bfloat16 and float32 arithmetic on one model's bfloat16 weights."""
    exact = hugging_face(folder, torch.bfloat16)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = torch.tensor([ids]).clamp(max=exact.config.vocab_size - 1)
    ours, theirs = (m(tokens[:, :-1]).logits[0].float().log_softmax(-1).gather(1, tokens[0, 1:, None]) for m in (exact, rounded))
    return float((ours - theirs).abs().max())


def worst(toys: Path, kind: str, mix: Sequence[Row], records: list[dict[str, Any]], stored: torch.dtype = torch.float32) -> float:
    """Largest difference between vLLM's log-probabilities, generated and of the prompt, and the reference's."""
    largest = 0.0
    for (_, domain, lam, *_mode), record in zip(mix, records, strict=True):
        ids = record["prompt"] + record["output"]
        logprobs = reference(toys, kind, ids, domain, lam, stored)
        ours = record.get("prompt_logprobs", []) + record["logprobs"]
        first = len(ids) - len(ours)
        theirs = [logprobs[i - 1, ids[i]].item() for i in range(first, len(ids))]
        largest = max(largest, max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
        assert all(math.isfinite(x) for x in ours)
    return largest


@torch.inference_mode()
def greedy(base: PreTrainedModel, decoder: PreTrainedModel | None, prompt: list[int], count: int) -> list[int]:
    """The mixture's most probable tokens after a prompt, lambda 0.6."""
    ids = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([ids])
        p = base(tokens).logits[0, -1].double().softmax(-1)
        if decoder is not None:
            logits = decoder(tokens).logits[0, -1].double()
            p = 0.4 * p
            p[: len(logits)] += 0.6 * logits.softmax(-1)
        ids.append(int(p.argmax()))
    return ids[len(prompt) :]


def chi_square(counts: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Standard deviations by which the chi-square statistic is above its mean, cells of less than 10 expected draws pooled."""
    few = expected < 10
    seen, wanted = (np.append(x[~few], x[few].sum()) for x in (counts, expected))
    if wanted[-1] < 10:
        seen, wanted = seen[:-1], wanted[:-1]
    degrees = len(wanted) - 1
    return float((((seen - wanted) ** 2 / wanted).sum() - degrees) / np.sqrt(2 * degrees))
