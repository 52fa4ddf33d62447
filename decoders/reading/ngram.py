"""An n-gram memory: exact counts of a text's n-grams, as a distribution over the next token and as a drafter.

**The model** is absolute discounting with interpolation (Ney, Essen and Kneser, 1994), and the base model as its lowest order. For a
context h of n tokens, h' the same without its first token, c() the counts in the text and N1+(h·) the number of distinct tokens after h:

    p_n(w | h) = max(c(hw) - D_n, 0) / c(h)  +  D_n N1+(h·) / c(h) · p_{n-1}(w | h')        p_{shortest-1} = p_base

with c(h) = Σ_w c(hw), D_n = n1 / (n1 + 2 n2) from the numbers of (n+1)-grams that occur once and twice, kept within LEAST_DISCOUNT to
MOST_DISCOUNT. The longest context h is the longest that occurs, of at most order - 1 tokens. Whatever is after an end token, and nothing
before it, is context: documents are unrelated, and a document's first token is the base's to predict. An end token is predicted like
others. So the memory's distribution is a sparse part s(w), not zero for the few tokens that followed the context's last `shortest` tokens,
and the base's with the mass r that is left:

    p_ngram = s + r · p_base,    Σ s + r = 1,    and r = 1, the base exactly, where no context was ever seen.

A long match says more than a short one. So lambda is tuned by length of the longest match, and stored as one number, the largest, and a
weight κ from 0 to 1 for each length, which is taken off the sparse part: s becomes κ s, r becomes 1 - κ (1 - r). Then
(1 - λ) p_base + λ p_ngram is the mixture with λκ, and whoever mixes needs to know of λ alone.

Suffix arrays instead of tables of n-grams are from the infinity-gram (arXiv 2401.17377), whose longest match is our drafts'.

    ngram.json        order, discounts, lambda, tokenizer, and every file's size and hash
    shard-0/ …        text and suffix arrays (`memdec.decoders.reading.ngram_shard`)
    shard-0/documents.json    the documents' ids

An occurrence of a context is in one shard, and counts add up over shards.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import json_hash, parse_json, read_bytes, read_json, shown
from memdec.decoders.reading.ngram_record import DOCUMENTS, FORMAT, NAME, NgramRecord
from memdec.decoders.reading.ngram_shard import FILES, Shard, token_type
from memdec.decoders.reading.record import checked
from memdec.decoders.reading.retrieval import check_file
from memdec.decoders.reading.suffix_array import DEPTH
from memdec.decoders.reading.weights import THREADS

SAMPLED = 256  # occurrences that a draft's next token is chosen from
LEAST_DISCOUNT, MOST_DISCOUNT = 0.1, 0.95
MOST_DOCUMENTS = 1 << 30  # bytes of documents.json

Numbers = NDArray[np.int64]
Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Continuations:
    """The memory's distribution after a context: the sparse part, and the mass that is left to the base."""

    token_ids: Numbers
    """[n], ascending, distinct."""
    probabilities: NDArray[np.float32]
    """[n], the sparse part; sums to 1 - base_mass."""
    base_mass: float
    """Weight of the base's distribution, from 0 to 1."""
    matched: int
    """Length of the longest matched context, in tokens; 0: none."""
    count: int
    """How often that context occurs."""


NOTHING = Continuations(np.zeros(0, np.int64), np.zeros(0, np.float32), 1.0, 0, 0)


@dataclass(frozen=True)
class Occurrence:
    """A place in the corpus where a context occurs."""

    document: str
    """The document's id."""
    offset: int
    """Tokens of the document before the context."""


class NgramMemory:
    """An open n-gram memory. Only read after `open`, so that threads may share it."""

    def __init__(self, path: Path, record: NgramRecord, shards: Sequence[Shard]) -> None:
        self.path, self.record, self.shards = path, record, tuple(shards)
        self.name, self.order, self.shortest, self.lambda_ = record.domain, record.order, record.shortest, record.lam
        self.tuned, self.tokens, self.vocabulary, self.tokenizer = record.tuned, record.tokens, record.vocabulary, record.token_map
        self.end, self.sources, self.discounts = record.end, record.sources, record.discounts
        self.weights = record.weights or [1.0] * len(record.discounts)
        self.perplexity, self.base = record.perplexity, record.base
        self.revision = json_hash(record.model_dump(mode="json", by_alias=True, exclude={"beside"}))
        """Of the memory alone: what was measured beside decoders changes nothing in it."""
        self.size = sum(f.bytes for f in record.files.values())
        self._kind = token_type(record.vocabulary)
        self._documents = [read_documents(shard.folder / DOCUMENTS) for shard in shards] if record.sources else []

    @classmethod
    def read_record(cls, folder: Path) -> NgramRecord:
        """Read ngram.json. Raises PackageError, one line."""
        if not folder.is_dir():
            raise PackageError(f"{folder}: no such folder")
        if not (folder / NAME).is_file():
            raise PackageError(f"{folder}: no {NAME} in it; make one with memdec ngram")
        fields = read_json(folder / NAME)
        if fields.get("format") != FORMAT:
            raise PackageError(f"{folder / NAME}: format is {shown(fields.get('format'))}, this version reads {FORMAT}")
        record = checked(NgramRecord, fields, f"{folder / NAME}: damaged")
        for name in (f"shard-{i}/{file}" for i in range(record.shards) for file in (*FILES, DOCUMENTS)):
            if name not in record.files:
                raise PackageError(f"{folder / NAME}: damaged: files has no {name}, wanted the size and hash of whatever is read")
        return record

    @classmethod
    def open(cls, folder: Path) -> "NgramMemory":
        """Read a package, check all bytes of its files, and memory-map them. Raises PackageError, one line, if it is damaged."""
        record = cls.read_record(folder)
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda name: check_file(folder / name, record.files[name].model_dump()), record.files):
                pass
        memory = cls(folder, record, [Shard(folder / f"shard-{i}", record.vocabulary) for i in range(record.shards)])
        for shard in memory.shards:
            shard.require_ends(record.end)
        if sum(len(shard.suffixes) for shard in memory.shards) != record.tokens:
            raise PackageError(f"{folder / NAME}: tokens is {record.tokens:,}, its shards have another number; make it again")
        return memory

    def continuations(self, context: Sequence[int], weights: Sequence[float] | None = None) -> Continuations:
        """The distribution after `context`, of which the last order - 1 tokens matter; with `weights` by length of match instead of the package's.

        The cost is bounded by the order, the logarithm of the text, and the vocabulary; it grows with the number of shards.
        """
        tail = self.tail(context, self.order - 1)
        result: tuple[Numbers, NDArray[np.float64], float, int, int] | None = None
        for length, ids, counts in self.levels(tail):
            result = self._longer(result, ids, counts, length)
        if result is None:
            return NOTHING
        ids, sparse, base_mass, matched, count = result
        weight = (self.weights if weights is None else weights)[matched - 1]
        return Continuations(ids, (weight * sparse).astype(np.float32), 1 - weight * (1 - base_mass), matched, count)

    def levels(self, tail: Sequence[int]) -> Iterator[tuple[int, Numbers, Numbers]]:
        """Yield (length, distinct next tokens, their counts) for each of a context's ends that occurs, from `shortest` tokens on.

        `tail`: only known ids, none of them an end token.
        """
        for length in range(self.shortest, len(tail) + 1):
            ids, counts = self._following(self._ranges(tail, length), length)
            if not len(ids):
                return
            yield length, ids, counts

    def _longer(
        self, shorter: tuple[Numbers, NDArray[np.float64], float, int, int] | None, ids: Numbers, counts: Numbers, length: int
    ) -> tuple[Numbers, NDArray[np.float64], float, int, int]:
        """The model of contexts of `length` tokens, from the counts of the tokens after one, and from the model of the next shorter ones."""
        total, discount = int(counts.sum()), self.discounts[length - 1]
        own, left = (counts - discount) / total, discount * len(ids) / total
        if shorter is None:
            return ids, own, left, length, total
        all_ids, sparse = shorter[0], left * shorter[1]
        sparse[np.searchsorted(all_ids, ids)] += own  # whatever followed the longer context has followed the shorter one, too
        return all_ids, sparse, left * shorter[2], length, total

    def draft(self, context: Sequence[int], length: int) -> list[int]:
        """At most `length` tokens that followed the longest match of `context`, each the most frequent there; ends with an end token.

        The longest match has at most DEPTH - 1 tokens, whatever the order. [] if nothing matches.
        """
        tail = self.tail(context, DEPTH - 1)
        matched, ranges = self._longest(tail)
        drafted: list[int] = []
        places = (
            [[p + matched for p in shard.positions(*r, SAMPLED)] for shard, r in zip(self.shards, ranges, strict=True)] if matched else []
        )
        while len(drafted) < length and any(places):
            following = [shard.ids[at].astype(np.int64).tolist() for shard, at in zip(self.shards, places, strict=True)]
            together = [token for part in following for token in part]
            token = min(set(together), key=lambda t: (-together.count(t), t))
            drafted.append(token)
            if token == self.end:
                break
            places = [[p + 1 for p, t in zip(at, part, strict=True) if t == token] for at, part in zip(places, following, strict=True)]
        return drafted

    def occurrences(self, context: Sequence[int], limit: int = 3) -> list[Occurrence]:
        """At most `limit` places of the longest match of `context` of at most order - 1 tokens, first ones first.

        Raises PackageError if the package was built without --with-sources.
        """
        if not self.sources:
            raise PackageError(f"{self.path}: was built without --with-sources; its documents are not named")
        matched, ranges = self._longest(self.tail(context, self.order - 1))
        places: list[Occurrence] = []
        for number, (shard, (begin, stop)) in enumerate(zip(self.shards, ranges, strict=True) if matched else ()):
            for position in sorted(shard.order[begin : min(stop, begin + SAMPLED)])[: limit - len(places)]:
                document = int(np.searchsorted(shard.ends, position, side="right"))
                start = int(shard.ends[document - 1]) if document else 0
                places.append(Occurrence(self._documents[number][document], position - start))
        return places

    def tail(self, context: Sequence[int], most: int) -> list[int]:
        """The last tokens of a context, at most `most`: those after its last end token, and after its last id outside the vocabulary."""
        tail: list[int] = []
        for token in reversed(context[-most:] if most else []):
            if token == self.end or not 0 <= token < self.vocabulary:
                break
            tail.append(int(token))
        return tail[::-1]

    def _ranges(self, tail: Sequence[int], length: int) -> Ranges:
        """Each shard's range of the last `length` tokens."""
        part = tail[len(tail) - length :]
        context = np.array(part, self._kind).tobytes()
        return [shard.range(context, part[0]) for shard in self.shards]

    def _following(self, ranges: Ranges, length: int) -> tuple[Numbers, Numbers]:
        """The distinct tokens after a context, ascending, and their counts, over all shards."""
        parts = [s.following(b, e, length) for s, (b, e) in zip(self.shards, ranges, strict=True) if b < e]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        ids, where = np.unique(np.concatenate([ids for ids, _ in parts]), return_inverse=True)
        return ids, np.bincount(where, np.concatenate([counts for _, counts in parts])).astype(np.int64)

    def _longest(self, tail: list[int]) -> tuple[int, Ranges]:
        """The length of the longest match of a context's end, and its ranges. If n tokens match, so do fewer: binary search."""
        matched, ranges, least, most = 0, [(0, 0)] * len(self.shards), self.shortest, len(tail)
        while least <= most:
            middle = (least + most + 1) // 2
            candidates = self._ranges(tail, middle)
            if any(begin < stop for begin, stop in candidates):
                matched, ranges, least = middle, candidates, middle + 1
            else:
                most = middle - 1
        return matched, ranges


def read_documents(path: Path) -> list[str]:
    """The ids of a shard's documents. Raises PackageError."""
    documents = parse_json(read_bytes(path, MOST_DOCUMENTS), path).get("documents")
    if not isinstance(documents, list) or not all(isinstance(d, str) for d in documents):
        raise PackageError(f"{path}: documents is {shown(documents)}, wanted a list of texts")
    return documents


def discount_of(once: int, twice: int) -> float:
    """n1 / (n1 + 2 n2), kept within bounds; the middle of what is usual where nothing occurs once."""
    return min(max(once / (once + 2 * twice), LEAST_DISCOUNT), MOST_DISCOUNT) if once else 0.75
