"""Write an n-gram memory: shards of documents, discounts from their counts, and the record."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.decoders.reading.errors import CorpusError
from memdec.decoders.reading.ngram import discount_of
from memdec.decoders.reading.ngram_record import DEFAULT_LAMBDA, DEFAULT_ORDER, DOCUMENTS, FORMAT, LONGEST_ORDER, NAME, NgramRecord
from memdec.decoders.reading.ngram_shard import Shard, ended, write_shard
from memdec.decoders.reading.record import checked
from memdec.decoders.reading.retrieval import describe
from memdec.decoders.reading.suffix_array import grams

Numbers = NDArray[np.int64]
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Text:
    """Documents as one array of token ids, each with an end token behind it."""

    ids: NDArray[Any]
    """[tokens]"""
    ends: Numbers
    """The position behind each document, its end token included, [documents]."""
    names: Sequence[str]
    """The documents' ids, [documents]."""

    @classmethod
    def of(cls, documents: dict[str, Sequence[int]], end: int) -> "Text":
        """Documents by their ids, without end tokens."""
        rows = [[*tokens, end] for tokens in documents.values()]
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        return cls(np.array([token for row in rows for token in row], np.int64), ends, list(documents))


def cut(text: Text, most: int) -> Iterator[Text]:
    """Cut a text between documents into parts of at most `most` tokens; a longer document is a part of its own."""
    start, first = 0, 0
    while first < len(text.ends):
        last = max(first + 1, int(np.searchsorted(text.ends, start + most, side="right")))
        stop = int(text.ends[last - 1])
        yield Text(text.ids[start:stop], text.ends[first:last] - start, text.names[first:last])
        start, first = stop, last


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's facts that an n-gram memory needs."""

    size: int
    """Token ids, from 0."""
    token_map: str
    """Hash of the token -> id map."""
    end: int
    """The token behind each document."""


def write_memory(folder: Path, domain: str, texts: Iterable[Text], vocabulary: Vocabulary, **record: Any) -> NgramRecord:
    """Write a package of one shard for each text; `record`: its further keys. Raises OSError, CorpusError."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        add_shard(folder, number, text, vocabulary)
    return write_record(folder, domain, vocabulary, **record)


def add_shard(folder: Path, number: int, text: Text, vocabulary: Vocabulary) -> None:
    """Write one shard. Raises OSError; CorpusError on a text without tokens, with tokens outside the vocabulary, or without its end tokens."""
    if len(text.ids) <= len(text.ends):
        raise CorpusError("no document with a token in it; wanted some text")
    if not ended(text.ids, text.ends, vocabulary.end):
        raise CorpusError(f"a document doesn't end with token {vocabulary.end}, the tokenizer's end of a document")
    if (largest := int(text.ids.max())) >= vocabulary.size:
        raise CorpusError(f"token {largest} in the text, wanted ids below {vocabulary.size}, the tokenizer's")
    place = folder / f"shard-{number}"
    place.mkdir(exist_ok=True)
    write_shard(place, text.ids, text.ends, vocabulary.end, vocabulary.size, LONGEST_ORDER)
    write_documents(place, text.names)


def write_documents(place: Path, names: Sequence[str]) -> None:
    """Write the ids of a shard's documents. Bytes of file names that are no text are escaped."""
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    (place / DOCUMENTS).write_text(json.dumps({"documents": shown}, ensure_ascii=False) + "\n")


def write_record(folder: Path, domain: str, vocabulary: Vocabulary, **more: Any) -> NgramRecord:
    """Write ngram.json for the shards that are in `folder`: discounts and hashes are computed from them."""
    places = sorted(folder.glob("shard-*"), key=lambda p: int(p.name.split("-")[1]))
    shards = [Shard(place, vocabulary.size) for place in places]
    listed = sorted(file for place in places for file in place.iterdir())
    fields: dict[str, Any] = {
        "format": FORMAT, "domain": domain, "order": DEFAULT_ORDER, "lambda": DEFAULT_LAMBDA, "tuned": False,
        "discounts": estimate_discounts(shards, vocabulary.end), "tokens": sum(len(s.suffixes) for s in shards),
        "vocabulary": vocabulary.size, "token_map": vocabulary.token_map, "end": vocabulary.end, "shards": len(shards),
        **more, "files": {str(f.relative_to(folder)): describe(f) for f in listed},
    }  # fmt: skip
    record = checked(NgramRecord, fields, folder / NAME)
    (folder / NAME).write_text(json.dumps(fields, indent=1) + "\n")
    return record


def estimate_discounts(shards: Sequence[Shard], end: int) -> list[float]:
    """The discount for contexts of 1, 2, … tokens: from how many n-grams occur once and twice in all shards together."""
    levels = zip(*(grams(_native(shard.ids), shard.suffixes, end, LONGEST_ORDER) for shard in shards), strict=True)
    if len(shards) == 1:
        counted = [level.counts for (level,) in levels]
    else:
        counted = [_together([(_hashes(s, g.starts, g.length), g.counts) for s, g in zip(shards, level, strict=True)]) for level in levels]
    return [discount_of(int((counts == 1).sum()), int((counts == 2).sum())) for counts in counted[1:]]


def _native(ids: NDArray[Any]) -> NDArray[Any]:
    return ids.astype(ids.dtype.newbyteorder("="))


def _hashes(shard: Shard, starts: Numbers, length: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each n-gram: it finds equal n-grams of several shards without comparing their tokens."""
    hashes = np.zeros(len(starts), np.uint64)
    positions = shard.suffixes[starts].astype(np.int64)
    for i in range(length):
        hashes = (hashes + shard.ids[positions + i].astype(np.uint64) + np.uint64(1)) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _together(parts: Sequence[tuple[NDArray[np.uint64], Numbers]]) -> Numbers:
    """Counts of the distinct n-grams of several shards."""
    _, where = np.unique(np.concatenate([hashes for hashes, _ in parts]), return_inverse=True)
    return np.bincount(where, np.concatenate([counts for _, counts in parts])).astype(np.int64)
