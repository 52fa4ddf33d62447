"""Stage 1: drop training documents that repeat held-out ones, by their 13-grams.

A document is dropped when at least SHARE of its distinct 13-grams of words occur in valid or test: perplexity on
text that was trained on says nothing. Only the held-out 13-grams are kept in memory, eight bytes each.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from memdec.decoders import parallel
from memdec.decoders.corpus import SPLITS, Corpus
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.reading.documents import Document

WORDS = 13  # words per gram, as in GPT-3's contamination study
SHARE = 0.3
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Grams = NDArray[np.uint64]


@dataclass(frozen=True)
class Cleaned:
    """A corpus without the documents that repeat held-out ones."""

    corpus: Corpus
    dropped: frozenset[tuple[str, str]]
    """(split, hash) of the dropped documents."""

    @classmethod
    def open(cls, corpus: Corpus, folder: Path) -> "Cleaned":
        """Open `corpus` with the dropped documents that stage 1 wrote to `folder`."""
        lines = (folder / "dropped.txt").read_text().splitlines()
        return cls(corpus, frozenset((split, name) for split, name in (line.split() for line in lines)))

    def documents(self, split: str) -> Iterator[str]:
        """Yield the texts of one split's documents that are kept."""
        return (document.text for document in self.named(split))

    def named(self, split: str) -> Iterator[Document]:
        """Yield the documents of one split that are kept, with their ids."""
        for document in self.corpus.named(split):
            if not self.dropped or (split, text_hash(document.text)) not in self.dropped:
                yield document


def write_near_duplicates(out: Path, corpus: Corpus, manifest: Manifest) -> Path:
    """Write dropped.txt (a line "split hash" per dropped document) and counts.json (how many of each split) into `out`."""
    with stage(out, manifest) as folder:
        if folder is None or parallel.rank() != 0:
            return out
        dropped: list[str] = []
        seen: Grams = np.zeros(0, np.uint64)
        counts = {}
        for split in reversed(SPLITS):  # test is never touched; valid is cleaned of test, train of both
            before, kept, documents = len(dropped), [seen], 0
            for text in tqdm(corpus.documents(split), desc=f"near-duplicates {split}", unit=" documents"):
                documents += 1
                grams = grams_of(text)
                if share_of(grams, seen) >= SHARE:
                    dropped.append(f"{split} {text_hash(text)}\n")
                elif split != "train":
                    kept.append(grams)
            seen = np.unique(np.concatenate(kept))
            counts[split] = {"documents": documents, "dropped": len(dropped) - before}
        (folder / "dropped.txt").write_text("".join(dropped))
        (folder / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    return out


def grams_of(text: str) -> Grams:
    """Sorted distinct hashes of a text's 13-grams; a shorter text has one gram, all its words."""
    words = np.array([zlib.crc32(w.encode()) for w in text.split()], np.uint64)
    if not len(words):
        return words
    width = min(WORDS, len(words))
    grams = np.zeros(len(words) - width + 1, np.uint64)
    for i in range(width):  # a polynomial in 64-bit arithmetic that wraps around
        grams = grams * MULTIPLIER + words[i : len(words) - width + 1 + i] + np.uint64(1)
    return np.unique(grams)


def share_of(grams: Grams, seen: Grams) -> float:
    """Share of `grams` that occur in `seen`, both sorted."""
    if not len(grams) or not len(seen):
        return 0.0
    at = np.minimum(np.searchsorted(seen, grams), len(seen) - 1)
    return float((seen[at] == grams).mean())


def text_hash(text: str) -> str:
    """Hash that identifies a document in dropped.txt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
