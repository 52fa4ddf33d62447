"""What a text's n-gram memory says at the text's own positions, as if each weren't in it: leave-one-out targets for the decoder.

An n-gram memory has seen its own text, so asked there it says what follows nearly for certain. At a position of the text the counts are
therefore taken without that one occurrence, for every context of 1, 2, … tokens that ends there: of the token that follows one less, of the
context one less, and one distinct token less where the occurrence was its only one. Everything else is as `memdec.decoders.reading.ngram`
states it, the discounts and weights by length of match included, which are of the whole text: one occurrence moves them by nothing.
Where nothing is left of a context, it never occurred elsewhere, and shorter ones decide; where nothing is left of the shortest, all mass is
left to the kNN target, which stands here where the base stands in a server:

    target = (1 - weight · (1 - r)) · t_kNN  +  weight · s,        with s and r, Σ s + r = 1, the memory's sparse part and what it leaves

* Contexts begin within the document. At its first token there is none, so its target is the kNN target; the second has one of one token.
* Documents with the same text, and what a document repeats, vouch for each other: one occurrence is left out, never its copies, so that
  there the target is nearly the label. That is what such a memory is for, text that comes back; a corpus with copies by accident should be
  rid of them first.
* The text is the whole train split, also where the datastore has pieces of it. A piece's first contexts are those of the text, though
  the teacher saw the end of the piece before; the token that is left out at a piece's end is the text's own next one.

Looking up 1.5 million contexts one by one would take longer than the search for neighbours. But the positions are the text's own, so the
inverse of the suffix array has each context's place, all are looked up at once, and a row costs no more than the tokens that followed.
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
    """Contexts of one length at some of the positions, without the positions' own occurrences."""

    rows: Numbers
    """Which positions, ascending."""
    longer: Grams
    """The n-grams that are a token longer: contexts with what follows."""
    begin: Numbers
    """The first of them for each position's context."""
    sizes: Numbers
    """How many there are."""
    own: Numbers
    """Which of them is the position's own."""
    total: Numbers
    """Occurrences, above 0."""
    left: Probabilities
    """The mass that is left to shorter contexts."""


class LeftOut:
    """The leave-one-out distributions of a text, `kept` tokens of each. Takes up to 90 bytes a token of it, as making its suffix array did."""

    def __init__(self, memory: NgramMemory, kept: int) -> None:
        if len(memory.shards) > 1:
            raise OptionError(
                f"--ngram-targets: {memory.path} has {len(memory.shards)} shards, wanted one: at most 67 million tokens of text"
            )
        shard = memory.shards[0]
        self.memory, self.kept, self.ids = memory, kept, shard.ids.astype(shard.ids.dtype.newbyteorder("="))
        self.ranks = np.empty(len(self.ids), np.int32)
        self.ranks[shard.suffixes] = np.arange(len(self.ids), dtype=np.int32)
        self.grams = [_small(found) for found in grams(self.ids, shard.suffixes, memory.end, memory.order)]
        self.ends = np.flatnonzero(self.ids == memory.end)
        self.likeliest, self.firsts = self._likeliest()
        self.shorter = self._shorter(shard.suffixes)

    @classmethod
    def open(cls, folder: Path, kept: int) -> "LeftOut":
        """Open the n-gram memory of a text. Raises PackageError; OptionError if the text has several shards."""
        return cls(NgramMemory.open(folder), kept)

    def rows(self, places: Numbers) -> tuple[Numbers, Probabilities, Probabilities]:
        """What follows the tokens up to each of `places` [n]: ids and probabilities [n, kept], most probable first, and what is left [n].

        The probabilities are exact, zeros fill the places left over.
        """
        parts = [self._rows(places[at : at + ROWS]) for at in range(0, len(places), ROWS)]
        ids, probs, left = (np.concatenate(part) for part in zip(*parts, strict=True))
        return ids, probs, left

    def beside(self, ids: Ids, masses: Floats, places: Numbers, weight: float) -> tuple[Ids, Floats]:
        """The target above from kNN targets [n, k] at `places` [n], as rows [n, k + kept]."""
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
        """Each length of context at the positions where it occurs elsewhere, shortest first."""
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
        """How many tokens of context each position has in its document, [n]."""
        before = np.searchsorted(self.ends, places)
        starts = np.concatenate([[0], self.ends + 1])[before]
        reach: Numbers = np.where(self.ids[places] == self.memory.end, 0, places - starts + 1)
        return reach

    def _level(self, length: int, rows: Numbers, ranks: NDArray[np.int32]) -> Level:
        """Contexts of `length` tokens that begin at suffixes of these ranks, those left out that occur nowhere else."""
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
        """What contexts of one length add: positions, tokens and probabilities, times `scale` of each position.

        `which` of the longer n-grams follow the context of the level's position number `at`.
        """
        counts = level.longer.counts[which] - (which == level.own[at])
        probs = np.where(counts > 0, counts - self.memory.discounts[length - 1], 0) * (scale[level.rows] / level.total)[at]
        return level.rows[at], level.longer.last[which].astype(np.int64), probs

    def _shortest(self, level: Level, above: Level | None) -> tuple[Numbers, Numbers]:
        """For the shortest contexts: what follows most frequently, and whatever follows a longer one."""
        at, place = _pairs(level)
        which = self.likeliest[place].astype(np.int64)
        if above is not None:
            theirs, longer = _pairs(above)
            at = np.concatenate([at, np.searchsorted(level.rows, above.rows)[theirs]])
            which = np.concatenate([which, self.shorter[longer]])
        both = np.unique(at * len(level.longer.starts) + which)
        return both // len(level.longer.starts), both % len(level.longer.starts)

    def _shorter(self, suffixes: NDArray[np.int32]) -> NDArray[np.int32]:
        """The n-gram without its first token, for each n-gram after a context one longer than the shortest."""
        if self.memory.order <= self.memory.shortest + 1:
            return np.zeros(0, np.int32)
        short, long = self.grams[self.memory.shortest : self.memory.shortest + 2]
        return (np.searchsorted(short.starts, self.ranks[suffixes[long.starts] + 1], "right") - 1).astype(np.int32)

    def _likeliest(self) -> tuple[NDArray[np.int32], Numbers]:
        """Of what follows each of the shortest contexts, the `kept` + 1 most frequent, and where each context's begin.

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
    """For each position of a level, by its number there, the n-grams from `begin` on: both [Σ sizes]."""
    at = np.arange(len(level.rows)).repeat(level.sizes)
    skipped = np.concatenate([[0], np.cumsum(level.sizes)[:-1]])
    return at, (level.begin - skipped)[at] + np.arange(len(at))


def _small(found: Grams) -> Grams:
    """The same in half the memory: a shard has fewer tokens than 2**31."""
    small: Any = np.int32
    return Grams(found.length, found.starts.astype(small), found.counts.astype(small), found.last)


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
