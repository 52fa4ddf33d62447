"""One shard of an n-gram memory: a stretch of text as token ids, its suffix array, and the tokens that follow its most frequent contexts.

    tokens.bin        token ids, [tokens], big-endian: bytes compare as the tokens do
    suffixes.bin      int32 [tokens]: the suffix array
    first.bin         int32 [vocabulary + 1]: where the range of each token begins in it
    ends.bin          int64 [documents]: the position behind each document, its end token included
    frequent.*.bin    contexts that occur more than FREQUENT times: their keys, and the counts of their next tokens

All files are flat arrays without header, little-endian except the tokens. They are memory-mapped, so that processes share them.
"""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import open_regular
from memdec.decoders.reading.suffix_array import Grams, grams, sort_suffixes

FREQUENT = 4096  # occurrences up to which the next tokens are read one by one: some 30 microseconds
TOKENS, SUFFIXES, FIRST, ENDS = "tokens.bin", "suffixes.bin", "first.bin", "ends.bin"
KEYS, OFFSETS, NEXT, COUNTS = "frequent.keys.bin", "frequent.offsets.bin", "frequent.next.bin", "frequent.counts.bin"
FILES = (TOKENS, SUFFIXES, FIRST, ENDS, KEYS, OFFSETS, NEXT, COUNTS)
LENGTH_BITS = 40  # low bits of a frequent context's key, where its range begins; the bits above are its length

Numbers = NDArray[np.int64]


def token_type(vocabulary: int) -> np.dtype[Any]:
    """How token ids are stored."""
    return np.dtype(">u2" if vocabulary <= 1 << 16 else ">u4")


def ended(ids: NDArray[Any], ends: Numbers, end: int) -> bool:
    """Whether each document of `ids` [tokens] has the token `end` behind it; without, contexts would reach across documents, or behind the text."""
    return len(ends) > 0 and int(ends[-1]) == len(ids) and bool((ids[ends - 1] == end).all())


def write_shard(folder: Path, ids: NDArray[Any], ends: Numbers, end: int, vocabulary: int, longest: int) -> None:
    """Write a shard of `ids` [tokens], which end with `end`; frequent contexts have fewer than `longest` tokens. Raises OSError."""
    suffixes = sort_suffixes(ids)
    write_arrays(folder, ids, suffixes, ends, end, vocabulary, longest)


def write_arrays(folder: Path, ids: NDArray[Any], suffixes: Any, ends: Numbers, end: int, vocabulary: int, longest: int) -> None:
    """Write a shard's files from its suffix array. Raises OSError."""
    native = ids.astype(ids.dtype.newbyteorder("="))
    keys, offsets, following, counts = _frequent(native, suffixes, end, longest)
    first = np.concatenate([[0], np.cumsum(np.bincount(native[suffixes], minlength=vocabulary))]).astype("<i4")
    arrays: dict[str, NDArray[Any]] = {
        TOKENS: ids.astype(token_type(vocabulary)), SUFFIXES: suffixes.astype("<i4"), FIRST: first, ENDS: ends.astype("<i8"),
        KEYS: keys.astype("<i8"), OFFSETS: offsets.astype("<i8"), NEXT: following.astype("<u4"), COUNTS: counts.astype("<i4"),
    }  # fmt: skip
    for name, array in arrays.items():
        with (folder / name).open("wb") as stream:
            stream.write(array.tobytes())


def _frequent(ids: NDArray[Any], suffixes: Any, end: int, longest: int) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Keys of the frequent contexts, where the next tokens of each begin, those tokens, and their counts."""
    parts: list[tuple[Numbers, Numbers, Numbers, Numbers]] = []
    contexts: Grams | None = None
    for level in grams(ids, suffixes, end, longest):
        if contexts is not None:
            parts.append(_next_of(contexts, level))
        often = (level.counts > FREQUENT) & (level.last != end)
        contexts = Grams(level.length, level.starts[often], level.counts[often], level.last[often])
    keys, sizes, following, counts = (np.concatenate(part) for part in zip(*parts, strict=True))
    return keys, np.concatenate([[0], np.cumsum(sizes)]), following, counts


def _next_of(contexts: Grams, longer: Grams) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Keys of contexts, how many tokens follow each, those tokens and their counts."""
    begin = np.searchsorted(longer.starts, contexts.starts)
    sizes = np.searchsorted(longer.starts, contexts.starts + contexts.counts) - begin
    at = np.repeat(begin - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(sizes.sum()) if len(sizes) else begin
    return _key(contexts.length, contexts.starts), sizes, longer.last[at].astype(np.int64), longer.counts[at]


def _key(length: int, start: Any) -> Any:
    """The key of a frequent context: its length, and where its range begins."""
    return (length << LENGTH_BITS) + start


class Shard:
    """An open shard. Contexts are given as big-endian bytes of their token ids; they hold no end token, and no id outside the vocabulary."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        """Memory-map the files, whose sizes and hashes the caller has checked. Raises PackageError."""
        kind = token_type(vocabulary)
        self.folder, self.width = folder, kind.itemsize
        self.text = _mapped(folder / TOKENS)
        self.ids: NDArray[Any] = np.frombuffer(self.text, kind)
        self.suffixes: NDArray[np.int32] = np.frombuffer(_mapped(folder / SUFFIXES), "<i4")
        self.order = memoryview(self.suffixes)  # type: ignore[arg-type]
        self.first = memoryview(np.frombuffer(_mapped(folder / FIRST), "<i4"))  # type: ignore[arg-type]
        self.ends: Numbers = np.frombuffer(_mapped(folder / ENDS), "<i8")
        self.keys: Numbers = np.frombuffer(_mapped(folder / KEYS), "<i8")
        self.offsets: Numbers = np.frombuffer(_mapped(folder / OFFSETS), "<i8")
        self.next: NDArray[np.uint32] = np.frombuffer(_mapped(folder / NEXT), "<u4")
        self.counts: NDArray[np.int32] = np.frombuffer(_mapped(folder / COUNTS), "<i4")
        self._check(vocabulary)

    def require_ends(self, end: int) -> None:
        """Raise PackageError unless each document has the token `end` behind it."""
        if not len(self.ends) or int(self.ends.min()) < 1 or int(self.ends.max()) > len(self.ids) or not ended(self.ids, self.ends, end):
            raise PackageError(f"{self.folder}: a document doesn't end with token {end}, as its record says; make it again")

    def _check(self, vocabulary: int) -> None:
        """Raise PackageError if arrays don't fit each other: hashes say that they are as they were written, not that they are right."""
        count = len(self.ids)
        if not count:
            raise PackageError(f"{self.folder}: {TOKENS} is empty; make it again")
        if len(self.suffixes) > count or len(self.first) != vocabulary + 1 or self.first[-1] != len(self.suffixes):
            raise PackageError(f"{self.folder}: its arrays have lengths that don't fit each other; make it again")
        if int(self.ids.max()) >= vocabulary:
            raise PackageError(f"{self.folder}: holds token {int(self.ids.max())}, wanted ids below {vocabulary}, its vocabulary")
        if len(self.suffixes) and not 0 <= int(self.suffixes.min()) <= int(self.suffixes.max()) < count:
            raise PackageError(f"{self.folder}: {SUFFIXES} holds positions outside of the text; make it again")
        if len(self.offsets) != len(self.keys) + 1 or len(self.next) != len(self.counts) or self.offsets[-1] != len(self.next):
            raise PackageError(f"{self.folder}: its arrays have lengths that don't fit each other; make it again")

    def range(self, context: bytes, first: int) -> tuple[int, int]:
        """The range of a context's occurrences in the suffix array; `first` is its first token. O(log occurrences of `first`)."""
        begin, stop, text, width, size = self.first[first], self.first[first + 1], self.text, self.width, len(context)
        if size == width:
            return begin, stop
        tokens = lambda position: text[position * width : position * width + size]  # noqa: E731
        begin = bisect_left(self.order, context, begin, stop, key=tokens)
        return begin, bisect_right(self.order, context, begin, stop, key=tokens)

    def following(self, begin: int, stop: int, length: int) -> tuple[Numbers, Numbers]:
        """The distinct tokens after a context of `length` tokens, ascending, and their counts, from the range of its occurrences."""
        if stop - begin > FREQUENT:
            key = _key(length, begin)
            at = int(np.searchsorted(self.keys, key))
            if at < len(self.keys) and self.keys[at] == key:
                part = slice(self.offsets[at], self.offsets[at + 1])
                return self.next[part].astype(np.int64), self.counts[part].astype(np.int64)
        if stop - begin == 1:  # most long contexts
            return np.array([self.ids[self.order[begin] + length]], np.int64), np.ones(1, np.int64)
        tokens = self.ids[self.suffixes[begin:stop] + length].astype(np.int64)
        edges = np.concatenate([[0], np.flatnonzero(tokens[1:] != tokens[:-1]) + 1, [len(tokens)]])
        return tokens[edges[:-1]], edges[1:] - edges[:-1]

    def positions(self, begin: int, stop: int, most: int) -> Sequence[int]:
        """At most `most` positions of a range, spread evenly over it."""
        chosen = range(begin, stop) if stop - begin <= most else np.linspace(begin, stop - 1, most).astype(int).tolist()
        return [self.order[at] for at in chosen]


def _mapped(path: Path) -> Any:
    """A file's bytes, memory-mapped; an empty file can't be and is b''. Raises PackageError."""
    with open_regular(path) as stream:
        try:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if stream.seek(0, 2) else b""
        except OSError as error:
            raise PackageError(f"{path}: {error.strerror or error}") from None
