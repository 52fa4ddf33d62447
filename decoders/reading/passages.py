"""BM25 over passages of a corpus's training tokens: the passages that RAG puts in front of the prompt.

bm25s is imported late: it brings numba, and vLLM, when it starts, trips over an attribute of llvmlite's.
"""

import errno
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memdec.decoders.reading.array_types import Ids

TOKENS, INDEX = "passages.npy", "bm25"


@dataclass(frozen=True)
class RagOptions:
    """Length of a passage, length of a query, and how often a passage is fetched, all in tokens."""

    passage: int = 128
    query: int = 32
    stride: int = 64

    def to_dict(self) -> dict[str, int]:
        """The fields as a dict, to be stored as JSON."""
        return asdict(self)


class Passages:
    """A BM25 index over passages [passages, length]."""

    def __init__(self, ids: Ids, index: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids, self.index, self.tokenizer = ids, index, tokenizer
        self.fallback = next(word for word in index.vocab_dict if word)  # for queries that contain no word, only digits and punctuation

    @classmethod
    def build(cls, ids: Ids, tokenizer: PreTrainedTokenizerBase, length: int) -> "Passages":
        """Cut `ids` [tokens] into passages of `length` and index their words."""
        import bm25s

        cut = np.asarray(ids[: len(ids) // length * length]).reshape(-1, length)
        index = bm25s.BM25()
        index.index(bm25s.tokenize(tokenizer.batch_decode(cut), stopwords=None, show_progress=False), show_progress=False)
        return cls(cut, index, tokenizer)

    @classmethod
    def open(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> "Passages":
        """Memory-map what `save` wrote."""
        import bm25s

        return cls(np.load(folder / TOKENS, mmap_mode="r"), bm25s.BM25.load(str(folder / INDEX), mmap=True), tokenizer)

    def save(self, folder: Path) -> None:
        """Write passages and index. Raises OSError."""
        np.save(folder / TOKENS, self.ids)
        try:
            self.index.save(str(folder / INDEX), show_progress=False)
        except (ValueError, RuntimeError) as error:
            raise OSError(errno.EIO, str(error), str(folder / INDEX)) from None

    @property
    def size(self) -> int:
        """Bytes needed at inference: the index's arrays and the passages' tokens."""
        return int(sum(a.nbytes for a in self.index.scores.values() if hasattr(a, "nbytes")) + self.ids.nbytes)

    def best(self, queries: Sequence[Ids]) -> Ids:
        """The best passage for each query, [queries, length]."""
        import bm25s

        words = bm25s.tokenize(self.tokenizer.batch_decode(list(queries)), stopwords=None, show_progress=False, return_ids=False)
        places, _ = self.index.retrieve([w or [self.fallback] for w in words], k=1, show_progress=False)
        chosen: Ids = self.ids[places[:, 0]]
        return chosen
