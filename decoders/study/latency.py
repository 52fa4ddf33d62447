"""Measure milliseconds per token of every method: one request at a time, methods interleaved, in one run.

All methods run on Hugging Face models, not in the server, so that what each adds to the base can be compared.
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
    """Median over ROUNDS of each method's milliseconds per token, decoded greedily; every round runs all methods. Prefill is included."""
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
