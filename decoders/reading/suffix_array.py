"""Suffix arrays over token ids: all positions of a text, in the order of the tokens that begin there.

All occurrences of a context are one range of it, found by two binary searches; within the range the next tokens ascend.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEPTH = 32  # tokens that the order looks at, a power of two; longer repetitions stay in the order of their positions

Suffixes = NDArray[np.int32]
"""Positions, [tokens], in the order of what begins there."""
Ranks = NDArray[np.uint64]


def sort_suffixes(ids: NDArray[Any]) -> Suffixes:
    """Positions of `ids` [tokens] ordered by the DEPTH tokens from there on, then by position; a text's end comes before every token.

    Prefix doubling (Manber and Myers, 1993): ranks by 2n tokens come from two ranks by n tokens. Needs about 50 bytes a token meanwhile.
    """
    if not len(ids):
        return np.zeros(0, np.int32)
    count, bits = len(ids), (int(ids.max()) + 1).bit_length()
    depth = min(DEPTH, 1 << (64 // bits).bit_length() - 1)  # a power of two, so that doubling ends at DEPTH and not beyond it
    key: Ranks = np.zeros(count, np.uint64)
    for i in range(depth):  # the first tokens, packed into one number; 0 stands for what lies behind the end
        key <<= np.uint64(bits)
        key[: max(count - i, 0)] |= ids[i:].astype(np.uint64) + np.uint64(1)
    rank, distinct = _ranks(key)
    while depth < DEPTH and distinct < count:
        np.left_shift(rank, np.uint64(32), out=key)
        key[: max(count - depth, 0)] |= rank[depth:]
        rank, distinct = _ranks(key)
        depth *= 2
    rank <<= np.uint64(32)
    rank |= np.arange(count, dtype=np.uint64)
    rank.sort()
    return (rank & np.uint64(0xFFFF_FFFF)).astype(np.int32)


def _ranks(key: Ranks) -> tuple[Ranks, int]:
    """The rank of every key among the distinct keys, from 1, and how many are distinct."""
    order = np.argsort(key)
    ordered = key[order]
    climbing = np.ones(len(key), np.uint32)
    np.cumsum(ordered[1:] != ordered[:-1], out=climbing[1:], dtype=np.uint32)
    climbing[1:] += 1
    rank: Ranks = np.empty(len(key), np.uint64)
    rank[order] = climbing
    return rank, int(climbing[-1])


@dataclass(frozen=True)
class Grams:
    """All distinct n-grams of one length, in their order; none reaches across a document's end, but the last token may be one."""

    length: int
    starts: NDArray[np.int64]
    """Where the range of each begins in the suffix array, [n-grams]."""
    counts: NDArray[np.int64]
    """How often each occurs, [n-grams]."""
    last: NDArray[Any]
    """The last token of each, [n-grams]."""


def grams(ids: NDArray[Any], suffixes: Suffixes, end: int, longest: int) -> Iterator[Grams]:
    """Yield the n-grams of each length from 1 to `longest`; `end` is the token behind each document."""
    padded = np.append(ids, np.full(longest, end, ids.dtype))
    fresh, inside = np.zeros(len(suffixes), bool), np.ones(len(suffixes), bool)
    fresh[:1] = True
    for length in range(1, longest + 1):
        column = padded[suffixes.astype(np.int64) + (length - 1)]
        fresh[1:] |= column[1:] != column[:-1]
        starts = np.flatnonzero(fresh)
        counts, kept = np.diff(starts, append=len(suffixes)), inside[starts]
        yield Grams(length, starts[kept], counts[kept], column[starts[kept]])
        inside &= column != end
