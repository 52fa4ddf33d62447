"""N-gram memories in plain Python: a slow, obvious reference, and small packages to try it on."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memdec.decoders.reading.ngram import NgramMemory, discount_of
from memdec.decoders.reading.ngram_index import Text, Vocabulary, write_memory

LONGEST = 8  # n-grams that are counted


class Reference:
    """The model that `memdec.decoders.reading.ngram` states, by counting every n-gram of every document."""

    def __init__(
        self, documents: Sequence[Sequence[int]], end: int, order: int, shortest: int = 1, weights: Sequence[float] = (1.0,) * (LONGEST - 1)
    ) -> None:
        self.weights = weights
        self.end, self.order, self.shortest = end, order, shortest
        self.after: dict[tuple[int, ...], Counter[int]] = {}
        for document in documents:
            tokens = [*document, end]
            for at in range(len(tokens)):
                for length in range(min(at, LONGEST - 1) + 1):
                    self.after.setdefault(tuple(tokens[at - length : at]), Counter())[tokens[at]] += 1
        self.discounts = [self._discount(length) for length in range(1, LONGEST)]

    def _discount(self, length: int) -> float:
        counts = Counter(c for context, after in self.after.items() if len(context) == length for c in after.values())
        return discount_of(counts[1], counts[2])

    def matched(self, context: Sequence[int]) -> int:
        """Length of the longest context that occurs, up to order - 1."""
        after_end = self.tail(context)
        return max((n for n in range(self.shortest, len(after_end) + 1) if tuple(after_end[-n:]) in self.after), default=0)

    def tail(self, context: Sequence[int]) -> list[int]:
        """The last order - 1 tokens, those after the last end token alone."""
        tail = list(context)[-(self.order - 1) :]
        return tail[len(tail) - tail[::-1].index(self.end) :] if self.end in tail else tail

    def distribution(self, context: Sequence[int], base: Sequence[float]) -> list[float]:
        """p_ngram after `context`, for a base that says `base` [vocabulary]."""
        p, tail = list(base), self.tail(context)
        for length in range(self.shortest, self.matched(context) + 1):
            counts = self.after[tuple(tail[-length:])]
            total, discount = sum(counts.values()), self.discounts[length - 1]
            p = [(max(counts[w] - discount, 0) + discount * len(counts) * p[w]) / total for w in range(len(base))]
        weight = self.weights[max(self.matched(context) - 1, 0)]
        return [weight * own + (1 - weight) * alone for own, alone in zip(p, base, strict=True)]


def make_memory(
    folder: Path, documents: Mapping[str, Sequence[int]], vocabulary: Vocabulary, shards: int = 1, **record: Any
) -> NgramMemory:
    """Write a package of these documents, spread over `shards`, and open it."""
    folder.mkdir(parents=True)
    names = list(documents)
    parts = [{name: documents[name] for name in names[i::shards]} for i in range(shards)]
    write_memory(folder, "toy", [Text.of(part, vocabulary.end) for part in parts], vocabulary, **record)
    return NgramMemory.open(folder)


def random_documents(seed: int, documents: int, length: int, vocabulary: int) -> dict[str, list[int]]:
    """Documents of few tokens, 1 to `vocabulary` - 1, that repeat each other: pieces of earlier text, and noise."""
    draw = random.Random(seed)
    made: list[list[int]] = []
    for _ in range(documents):
        row: list[int] = []
        while len(row) < length:
            source = draw.choice(made) if made and draw.random() < 0.5 else [draw.randrange(1, vocabulary) for _ in range(length)]
            start = draw.randrange(len(source))
            row += source[start : start + draw.randrange(1, 12)]
        made.append(row[: draw.randrange(1, length + 1)])
    return {f"document-{i}": row for i, row in enumerate(made)}
