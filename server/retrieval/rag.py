"""Passages in front of the prompt: which one, and how much of it fits."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from memdec.decoders.passages import Passages
from memdec.decoders.retrieval import RetrievalPackage

T = TypeVar("T")


@dataclass
class Added:
    """How many tokens retrieval has added to the prompts of one HTTP request: they count as usage."""

    tokens: int = 0


added: ContextVar[Added] = ContextVar("added", default=Added())  # noqa: B039  what nobody reads may be shared


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
