"""Milliseconds per token of every method, in one run, one request at a time, interleaved.

Not the server's speed (that is vLLM's), but all methods by the same means: what each adds to the base is what matters.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from memdec.decoders.reading.array_types import Ids
from memdec.decoders.study.steps import Step

ROUNDS = 5
PROMPT = 256


@torch.inference_mode()
def milliseconds(methods: dict[str, Callable[[], Step]], prompt: Ids, tokens: int) -> dict[str, float]:
    """Median over ROUNDS of milliseconds per token for each method, greedy, every round in turn through all of them; the prompt's own pass counts."""
    start = torch.from_numpy(np.asarray(prompt[:PROMPT]).astype(np.int64))[None]
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, fresh in methods.items():
            begun = time.perf_counter()
            step, fed = fresh(), start
            for _ in range(tokens):
                fed = step(fed).argmax().reshape(1, 1)
            taken[name].append(1e3 * (time.perf_counter() - begun) / tokens)
    return {name: round(float(np.median(values)), 3) for name, values in taken.items()}
