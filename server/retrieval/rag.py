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
    """Number of tokens that retrieval has added to one prompt."""

    tokens: int = 0


@dataclass
class Added:
    """Numbers of tokens that retrieval has added to each prompt of one HTTP request; they count as usage."""

    counts: list[Count] = field(default_factory=list)

    def of_next_prompt(self) -> Count:
        """Append a count for the request's next prompt, and return it."""
        self.counts.append(Count())
        return self.counts[-1]

    @property
    def tokens(self) -> int:
        """Number of tokens added to all prompts together."""
        return sum(count.tokens for count in self.counts)


class Unread(Added):
    """The counts of requests that no client has sent, such as shadows: nothing reads them."""

    def of_next_prompt(self) -> Count:
        """A new count, which isn't kept."""
        return Count()


added: ContextVar[Added] = ContextVar("added", default=Unread())  # noqa: B039  the default keeps no counts


@dataclass(frozen=True)
class Prompt:
    """A client's prompt with a passage in it, as token ids."""

    ids: list[int]
    head: int
    """Number of the client's tokens before the passage: 1 if the prompt begins with a beginning-of-text token, else 0."""
    passage: int
    """Number of tokens of the passage; 0 if none fits."""

    def without(self, rows: Sequence[T]) -> list[T]:
        """One row for each id of the prompt, less the rows of the passage."""
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
        """The prompt `ids`, preceded by the passage that matches its last tokens best. The passage is truncated to `room` tokens."""
        passage = self.passages.best([np.asarray(ids[-self.package.rag.query :])])[0][: max(0, room)].tolist()
        head = int(bool(ids) and ids[0] == self.bos)
        return Prompt([*ids[:head], *passage, *ids[head:]], head, len(passage))
