"""N-gram memories in the engine's step: p_ngram = s + r * p_base, where s is sparse and looked up on the host, by the text before each row."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memdec.decoders.reading.ngram import Continuations, NgramMemory

Weights = tuple[float, ...]
"""Kappa by length of the longest match, in place of the memory's own."""
Known = MutableMapping[tuple[tuple[int, ...], Weights | None], Continuations]
"""One memory's distributions, by context and weights."""


@dataclass(frozen=True)
class SparseRows:
    """A memory's distributions after n contexts, on the device of the logits."""

    rows: Tensor
    """Context of each entry, [m] int64, ascending."""
    tokens: Tensor
    """Token of each entry, [m] int64; no token twice for a context."""
    probabilities: Tensor
    """The sparse part s, [m] float32."""
    base_mass: Tensor
    """The base's part r, [n] float64; 1 where the context was never seen."""
    matched: Sequence[int]
    """Length of each context's longest match, in tokens; [n]."""


def look_up(
    memory: NgramMemory, contexts: Sequence[Sequence[int]], device: torch.device, known: Known, weights: Sequence[Weights | None] = ()
) -> SparseRows:
    """Look up the contexts that aren't `known`, equal ones once: all choices of a prompt begin with the same.

    `weights`: each context's own, instead of the memory's.
    """
    looked_up = []
    for context, of_context in zip(contexts, weights or [None] * len(contexts), strict=True):
        key = tuple(context), of_context
        if key not in known:
            known[key] = memory.continuations(*key)
        looked_up.append(known[key])
    counts = np.array([len(f.token_ids) for f in looked_up], np.int64)
    rows = np.arange(len(looked_up)).repeat(counts)
    tokens = np.concatenate([f.token_ids for f in looked_up]).astype(np.int64, copy=False)
    probabilities = np.concatenate([f.probabilities for f in looked_up]).astype(np.float32, copy=False)
    mass = np.array([f.base_mass for f in looked_up], np.float64)
    own_rows, own_tokens, own, left = (torch.from_numpy(a).to(device) for a in (rows, tokens, probabilities, mass))
    return SparseRows(own_rows, own_tokens, own, left, [f.matched for f in looked_up])
