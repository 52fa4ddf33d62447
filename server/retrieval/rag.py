"""Passages in front of the prompt: which one, and how much of it fits."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from memdec.decoders.reading.passages import Passages
from memdec.decoders.reading.retrieval import RetrievalPackage

T = TypeVar("T")


@dataclass
class Count:
    """How many tokens retrieval has added to one prompt, so far."""

    tokens: int = 0


@dataclass
class Added:
    """What retrieval has added to each prompt of one HTTP request: it counts as usage."""

    counts: list[Count] = field(default_factory=list)

    def of_next_prompt(self) -> Count:
        """A count for the request's next prompt."""
        self.counts.append(Count())
        return self.counts[-1]

    @property
    def tokens(self) -> int:
        """Those of all prompts."""
        return sum(count.tokens for count in self.counts)


class Unread(Added):
    """Of requests that aren't a client's, such as shadows."""

    def of_next_prompt(self) -> Count:
        """A count that nobody keeps."""
        return Count()


added: ContextVar[Added] = ContextVar("added", default=Unread())  # noqa: B039  it holds nothing


@dataclass(frozen=True)
class Prompt:
    """A client's prompt with a passage in it, as token ids."""

    ids: list[int]
    head: int
    """Tokens of the client's before the passage: a beginning-of-text token stays first."""
    passage: int
    """Tokens of the passage; 0 if none fitted."""

    def without(self, rows: Sequence[T]) -> list[T]:
        """Rows [ids] without the passage's."""
        return [*rows[: self.head], *rows[self.head + self.passage :]]


@dataclass(frozen=True)
class PassageFinder:
    """One domain's passages."""

    package: RetrievalPackage
    passages: Passages
    bos: int | None

    @classmethod
    def open(cls, package: RetrievalPackage, tokenizer: PreTrainedTokenizerBase) -> "PassageFinder":
        """Memory-map a package's passages."""
        return cls(package, Passages.open(package.path, tokenizer), tokenizer.bos_token_id)

    def augment(self, ids: Sequence[int], room: int) -> Prompt:
        """The prompt `ids` with the best passage for its last tokens in front, cut at its end to `room` tokens."""
        found = self.passages.best([np.asarray(ids[-self.package.rag.query :])])[0][: max(0, room)].tolist()
        head = int(bool(ids) and ids[0] == self.bos)
        return Prompt([*ids[:head], *found, *ids[head:]], head, len(found))
