"""Perplexity of base, memory and mixture, and the lambda that fits them best.

Windows of WINDOW tokens, half overlapping; only each window's second half is scored, so every scored token has seen at least
WINDOW / 2 tokens and is scored once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedModel

from decoders.train import Ids, keep_freed_memory

WINDOW = 512
BATCH = 8
LAMBDAS = tuple(round(0.05 * i, 2) for i in range(21))

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities in nats of the same scored tokens under base and memory, each [tokens]."""

    base: Floats
    memory: Floats

    def mixture(self, lam: float) -> Floats:
        """Log-probabilities under lam * p_mem + (1 - lam) * p_base (paper, eq. 7), [tokens]."""
        if lam in (0.0, 1.0):
            return self.memory if lam else self.base
        mixed: Floats = np.logaddexp(self.base + np.log1p(-lam), self.memory + np.log(lam))
        return mixed

    def best_lambda(self) -> float:
        """The lambda of LAMBDAS with the lowest perplexity."""
        return min(LAMBDAS, key=lambda lam: perplexity(self.mixture(lam)))


def perplexity(logprobs: Floats) -> float:
    """Exp of the mean negative log-probability."""
    return float(np.exp(-logprobs.mean()))


def windows(length: int, window: int = WINDOW) -> Iterator[int]:
    """Start positions of the windows that are scored in `length` tokens."""
    yield from range(0, length - window, window // 2)


def score(base: PreTrainedModel, memory: PreTrainedModel, ids: Ids, what: str) -> Scores:
    """Score `ids` [tokens] under both models."""
    return Scores(label_logprobs(base, ids, f"{what} base"), label_logprobs(memory, ids, f"{what} memory"))


@torch.inference_mode()
def label_logprobs(model: PreTrainedModel, ids: Ids, what: str) -> Floats:
    """Log p(token) for the second half of every window of `ids` [tokens], in order."""
    keep_freed_memory()
    device = next(model.parameters()).device
    starts, parts, half = list(windows(len(ids))), [], WINDOW // 2
    for group in tqdm(range(0, len(starts), BATCH), desc=what, unit=" batches", mininterval=5):
        rows = np.stack([ids[s : s + WINDOW + 1] for s in starts[group : group + BATCH]]).astype(np.int64)
        tokens = torch.from_numpy(rows).to(device)
        # Only the scored half is projected: it is most of the cost at small widths.
        logits = model(input_ids=tokens[:, :-1], use_cache=False, logits_to_keep=half).logits.float()
        parts.append(logits.log_softmax(-1).gather(-1, tokens[:, -half:, None]).flatten().double().cpu().numpy())
    return np.concatenate(parts)


def table(rows: list[dict[str, str | float]]) -> str:
    """A markdown table of dicts that share their keys."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def measure(base: PreTrainedModel, memory: PreTrainedModel, valid: Ids, test: Ids) -> dict[str, float | int]:
    """Tune lambda on valid, measure on test: the figures a package records."""
    lam = score(base, memory, valid, "valid").best_lambda()
    scores = score(base, memory, test, "test")
    return {
        "lambda": lam,
        "base": round(perplexity(scores.base), 3),
        "memory": round(perplexity(scores.memory), 3),
        "mixture": round(perplexity(scores.mixture(lam)), 3),
        "tokens": len(scores.base),
        "window": WINDOW,
    }
