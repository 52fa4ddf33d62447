"""Leave-one-out targets for the decoder: a text's n-gram memory at the text's own positions, as if each position weren't in the text.

An n-gram memory has seen its own text, so it predicts the text's next tokens almost with certainty. At each position the counts are therefore
taken without that one occurrence, for every context of 1, 2, … tokens that ends there: the count of the next token is one less, the count of
the context is one less, and the context has one distinct next token less if the occurrence was the only one. Everything else is as in
`memdec.decoders.reading.ngram`; discounts and weights by length of match stay those of the full text, which one occurrence hardly changes.
A context without a remaining occurrence never occurred elsewhere, so shorter ones decide. If none remains of the shortest, all mass goes
to the kNN target, which takes the base's place in the mixture:

    target = (1 - weight · (1 - r)) · t_kNN  +  weight · s,        with s and r, Σ s + r = 1, the memory's sparse part and what it leaves

* Contexts begin within the document. Its first token has none, so its target is the kNN target; the second has a context of one token.
* Repeated text, in one document or several, predicts itself: one occurrence is left out, never its copies, so the target there is almost
  the label. That is the purpose of such a memory; copies that are in a corpus by accident should be removed first.
* The text is the whole train split, also where the datastore has pieces of it. At a piece's beginning the contexts are the text's, though
  the teacher saw the end of the piece before; at its end the token that is left out is the text's next one.

Looking up 1.5 million contexts one by one would take longer than the search for neighbours. But since the positions are the
text's own, the inverse of the suffix array has each context's place: all are looked up at once, and a row costs no more than the tokens
that followed its contexts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.decoders.knn_lm import add_up
from memdec.decoders.reading.array_types import Floats, Ids
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.suffix_array import Grams, grams

ROWS = 1024  # positions looked up at a time: about a million (position, token) pairs

Numbers = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """Contexts of one length that end at some of the positions, counted without those positions' own occurrences."""

    rows: Numbers
    """Numbers of the positions, ascending."""
    longer: Grams
    """The n-grams of one token more: each context with a next token."""
    begin: Numbers
    """Index in `longer` of the first n-gram of each position's context."""
    sizes: Numbers
    """Number of n-grams of each position's context."""
    own: Numbers
    """Index in `longer` of each position's own n-gram, whose next token is the label."""
    total: Numbers
    """Occurrences of each context besides the position's own, above 0."""
    left: Probabilities
    """The mass that is left to shorter contexts."""


class LeftOut:
    """The leave-one-out distributions of a text, `kept` tokens of each. It needs up to 90 bytes of memory a token, as making the suffix array did."""

    def __init__(self, memory: NgramMemory, kept: int) -> None:
        if len(memory.shards) > 1:
            raise OptionError(
                f"--ngram-targets: {memory.path} has {len(memory.shards)} shards, wanted one: at most 67 million tokens of text"
            )
        shard = memory.shards[0]
        self.memory, self.kept, self.ids = memory, kept, shard.ids.astype(shard.ids.dtype.newbyteorder("="))
        self.ranks = np.empty(len(self.ids), np.int32)
        self.ranks[shard.suffixes] = np.arange(len(self.ids), dtype=np.int32)
        self.grams = [_small(level) for level in grams(self.ids, shard.suffixes, memory.end, memory.order)]
        self.ends = np.flatnonzero(self.ids == memory.end)
        self.likeliest, self.firsts = self._likeliest()
        self.shorter = self._shorter(shard.suffixes)

    @classmethod
    def open(cls, folder: Path, kept: int) -> "LeftOut":
        """Open the n-gram memory of a text. Raises PackageError; OptionError if the text has several shards."""
        return cls(NgramMemory.open(folder), kept)

    def rows(self, places: Numbers) -> tuple[Numbers, Probabilities, Probabilities]:
        """The sparse parts s after each of `places` [n]: ids and probabilities [n, kept], most probable first; and the mass r that is left, [n].

        The probabilities are exact; rows with fewer tokens are padded with zeros.
        """
        parts = [self._rows(places[at : at + ROWS]) for at in range(0, len(places), ROWS)]
        ids, probs, left = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ids, probs, left

    def beside(self, ids: Ids, masses: Floats, places: Numbers, weight: float) -> tuple[Ids, Floats]:
        """The targets (see the top of this file) from kNN targets [n, k] at `places` [n], as rows [n, k + kept]."""
        tokens, sparse, left = self.rows(places)
        kept = (1 - weight * (1 - left))[:, None] * masses
        together = np.concatenate([kept, weight * sparse], 1).astype(np.float32)
        return add_up(np.concatenate([ids, tokens.astype(ids.dtype)], 1), together)

    def _rows(self, places: Numbers) -> tuple[Numbers, Probabilities, Probabilities]:
        levels = self._levels(places)
        matched, left = np.zeros(len(places), np.int64), np.ones(len(places))
        for length, level in levels.items():
            matched[level.rows] = length
            left[level.rows] *= level.left
        weights = np.concatenate([[1.0], self.memory.weights])[matched]
        scale, parts = weights.copy(), []
        for length, level in reversed(levels.items()):
            pairs = _pairs(level) if length > self.memory.shortest else self._shortest(level, levels.get(length + 1))
            parts.append(self._part(length, level, scale, *pairs))
            scale[level.rows] *= level.left
        ids, probs = _most_probable(parts, (len(places), self.kept), self.memory.vocabulary)
        return ids, probs, 1 - weights * (1 - left)

    def _levels(self, places: Numbers) -> dict[int, Level]:
        """Length of context -> the positions whose context of that length occurs elsewhere; shortest first."""
        rows, reach, levels = np.arange(len(places)), self._reach(places), {}
        for length in range(self.memory.shortest, self.memory.order):
            rows = rows[reach[rows] >= length]
            if not len(rows):
                break
            level = self._level(length, rows, self.ranks[places[rows] - length + 1])
            if len(level.rows):
                levels[length] = level
            rows = level.rows
        return levels

    def _reach(self, places: Numbers) -> Numbers:
        """Number of tokens from the beginning of its document up to each position, [n]; 0 for end tokens."""
        before = np.searchsorted(self.ends, places)
        starts = np.concatenate([[0], self.ends + 1])[before]
        reach: Numbers = np.where(self.ids[places] == self.memory.end, 0, places - starts + 1)
        return reach

    def _level(self, length: int, rows: Numbers, ranks: NDArray[np.int32]) -> Level:
        """The contexts of `length` tokens that begin at suffixes of these ranks, without those that occur nowhere else."""
        contexts, longer = self.grams[length - 1], self.grams[length]
        which = np.searchsorted(contexts.starts, ranks, "right") - 1
        total = contexts.counts[which].astype(np.int64) - 1
        kept = total > 0
        rows, ranks, which, total = rows[kept], ranks[kept], which[kept], total[kept]
        begin = np.searchsorted(longer.starts, contexts.starts[which])
        sizes = np.searchsorted(longer.starts, contexts.starts[which] + contexts.counts[which]) - begin
        own = np.searchsorted(longer.starts, ranks, "right") - 1
        distinct = sizes - (longer.counts[own] == 1)
        left = self.memory.discounts[length - 1] * distinct / total
        if length == self.memory.shortest:
            begin, sizes = self.firsts[which], np.diff(self.firsts)[which]
        return Level(rows, longer, begin, sizes, own, total, left)

    def _part(self, length: int, level: Level, scale: Probabilities, at: Numbers, which: Numbers) -> tuple[Numbers, Numbers, Probabilities]:
        """What the contexts of one length add to s: positions, tokens and probabilities, scaled by `scale` of each position.

        `which` of the longer n-grams follow the context of the level's position number `at`.
        """
        counts = level.longer.counts[which] - (which == level.own[at])
        probs = np.where(counts > 0, counts - self.memory.discounts[length - 1], 0) * (scale[level.rows] / level.total)[at]
        return level.rows[at], level.longer.last[which].astype(np.int64), probs

    def _shortest(self, level: Level, above: Level | None) -> tuple[Numbers, Numbers]:
        """Like `_pairs`, for the shortest contexts: their most frequent next tokens, and those that also follow a longer context."""
        at, place = _pairs(level)
        which = self.likeliest[place].astype(np.int64)
        if above is not None:
            theirs, longer = _pairs(above)
            at = np.concatenate([at, np.searchsorted(level.rows, above.rows)[theirs]])
            which = np.concatenate([which, self.shorter[longer]])
        both = np.unique(at * len(level.longer.starts) + which)
        return both // len(level.longer.starts), both % len(level.longer.starts)

    def _shorter(self, suffixes: NDArray[np.int32]) -> NDArray[np.int32]:
        """For each n-gram of the second shortest contexts: index of the n-gram without its first token."""
        if self.memory.order <= self.memory.shortest + 1:
            return np.zeros(0, np.int32)
        short, long = self.grams[self.memory.shortest : self.memory.shortest + 2]
        return (np.searchsorted(short.starts, self.ranks[suffixes[long.starts] + 1], "right") - 1).astype(np.int32)

    def _likeliest(self) -> tuple[NDArray[np.int32], Numbers]:
        """Indices of the `kept` + 1 most frequent n-grams of each of the shortest contexts, and where each context's indices begin.

        No other token can be among a row's most probable unless a longer context has it: those are as frequent, one left out.
        """
        contexts, longer = self.grams[self.memory.shortest - 1], self.grams[self.memory.shortest]
        owner = np.searchsorted(contexts.starts, longer.starts, "right") - 1
        order = np.lexsort((-longer.counts, owner))
        owner = owner[order]
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        kept = place <= self.kept
        return order[kept].astype(np.int32), np.searchsorted(owner[kept], np.arange(len(contexts.starts) + 1))


def _pairs(level: Level) -> tuple[Numbers, Numbers]:
    """All pairs of a position's number in the level and the index of one of its n-grams, both [Σ sizes]."""
    at = np.arange(len(level.rows)).repeat(level.sizes)
    skipped = np.concatenate([[0], np.cumsum(level.sizes)[:-1]])
    return at, (level.begin - skipped)[at] + np.arange(len(at))


def _small(level: Grams) -> Grams:
    """A copy in half the memory, as int32: a shard has fewer than 2**31 tokens."""
    small: Any = np.int32
    return Grams(level.length, level.starts.astype(small), level.counts.astype(small), level.last)


def _most_probable(
    parts: list[tuple[Numbers, Numbers, Probabilities]], shape: tuple[int, int], vocabulary: int
) -> tuple[Numbers, Probabilities]:
    """Add up the probabilities of equal (position, token) pairs, and keep each position's most probable tokens, `shape`."""
    ids, probs = np.zeros(shape, np.int64), np.zeros(shape)
    if not parts:
        return ids, probs
    rows, tokens, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    pairs, where = np.unique(rows * vocabulary + tokens, return_inverse=True)
    summed = np.bincount(where, values)
    owner = pairs // vocabulary
    order = np.lexsort((-summed, owner))
    owner = owner[order]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    kept = place < shape[1]
    at = (owner[kept], place[kept])
    ids[at], probs[at] = pairs[order][kept] % vocabulary, summed[order][kept]
    return ids, probs
