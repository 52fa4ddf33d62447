"""Perplexity of base, memory and mixture, and the lambda with the lowest.

Windows of WINDOW tokens, half overlapping; only each window's second half is scored, so every scored token has seen at least
WINDOW / 2 tokens and is scored once.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memdec.decoders.models import OUTSIDE
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.train import keep_freed_memory, progress

WINDOW = 512
SCORED = WINDOW // 2  # scored tokens per window: its last ones
BATCH = 8
LAMBDAS = tuple(round(0.05 * i, 2) for i in range(21))
MEASURED = 128  # windows per split, spread evenly, on which a package's figures are measured

Floats = NDArray[np.float64]


def mix(base: Floats, memory: Floats, lam: float) -> Floats:
    """Log-probabilities under lam * p_mem + (1 - lam) * p_base (paper, eq. 7), [tokens]."""
    if lam in (0.0, 1.0):
        return memory if lam else base
    mixed: Floats = np.logaddexp(base + np.log1p(-lam), memory + np.log(lam))
    return mixed


def best_lambda(base: Floats, memory: Floats) -> float:
    """The lambda of LAMBDAS with the lowest perplexity on tokens [n] scored under both."""
    return min(LAMBDAS, key=lambda lam: perplexity(mix(base, memory, lam)))


def perplexity(logprobs: Floats) -> float:
    """Exp of the mean negative log-probability."""
    return float(np.exp(-logprobs.mean()))


def windows(length: int, most: int | None = None) -> list[int]:
    """Start positions of the scored windows in `length` tokens; with `most`, at most so many, spread evenly."""
    starts = list(range(0, length - WINDOW, SCORED))
    if most is None or most >= len(starts):
        return starts
    return [starts[i] for i in np.linspace(0, len(starts) - 1, most).round().astype(int)]


def scored(starts: Sequence[int]) -> NDArray[np.int64]:
    """Positions of the tokens that are scored in the windows at `starts`, [windows * SCORED]."""
    first = np.asarray(starts, np.int64)[:, None] + WINDOW - SCORED + 1
    return (first + np.arange(SCORED)).reshape(-1)


def label_logprobs(model: PreTrainedModel, ids: Ids, what: str, starts: Sequence[int] | None = None) -> Floats:
    """Log p(token) for the second half of the windows at `starts`, or of every window of `ids` [tokens], in order."""
    return score(model, ids, what, starts)[0]


@torch.inference_mode()
def score(
    model: PreTrainedModel, ids: Ids, what: str, starts: Sequence[int] | None = None, keys: bool = False
) -> tuple[Floats, NDArray[np.float32]]:
    """Log p(token) of the scored tokens, [n]; with `keys` also the final hidden states that predict them, [n, width], else [0, 0]."""
    keep_freed_memory()
    device = next(model.parameters()).device
    starts = windows(len(ids)) if starts is None else starts
    parts, states = [], []
    with progress(what, len(starts) * SCORED, " tokens") as bar:
        for group in range(0, len(starts), BATCH):
            rows = np.stack([ids[s : s + WINDOW + 1] for s in starts[group : group + BATCH]]).astype(np.int64)
            tokens = torch.from_numpy(rows).to(device)
            # Only the scored half is projected: it is most of the cost at small widths.
            out = model(input_ids=tokens[:, :-1], use_cache=False, logits_to_keep=SCORED, output_hidden_states=keys)
            logits = out.logits.float()
            parts.append(logits.log_softmax(-1).gather(-1, tokens[:, -SCORED:, None]).flatten().double().cpu().numpy())
            if keys:
                states.append(out.hidden_states[-1][:, -SCORED:].reshape(-1, out.hidden_states[-1].shape[-1]).float().cpu().numpy())
            bar.update(len(rows) * SCORED)
    return np.concatenate(parts), np.concatenate(states) if keys else np.zeros((0, 0), np.float32)


def table(rows: Sequence[dict[str, str | float]]) -> str:
    """A markdown table of dicts that share their keys."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def measure(base: PreTrainedModel, memory: PreTrainedModel, valid: Ids, test: Ids) -> dict[str, float | int]:
    """Tune lambda on `valid` and measure perplexities on `test`, both [tokens]; returns the figures that a package records."""
    v, t = windows(len(valid), MEASURED), windows(len(test), MEASURED)
    lam = best_lambda(label_logprobs(base, valid, "valid base", v), label_logprobs(memory, valid, "valid memory", v))
    ours, theirs = label_logprobs(base, test, "test base", t), label_logprobs(memory, test, "test memory", t)
    return {"lambda": lam, **figures(ours, theirs, lam), "tokens": len(ours), "window": WINDOW}


def figures(base: Floats, memory: Floats, lam: float) -> dict[str, float]:
    """Perplexities of tokens [n] scored under both; `memory` on those that it can predict, whose share is `covered` if it isn't 1."""
    known = memory > OUTSIDE / 2
    made = {
        "base": round(perplexity(base), 3),
        "memory": round(perplexity(memory[known]) if known.any() else float("inf"), 3),
        "mixture": round(perplexity(mix(base, memory, lam)), 3),
    }
    return made if known.all() else {**made, "covered": round(float(known.mean()), 4)}
