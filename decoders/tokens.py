"""Stage 2: token ids on disk, one flat array a split, `<|endoftext|>` after each document.

Position i of a split is the id of its i-th token; everything later (datastore entries, kNN targets) is indexed by it.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from decoders.corpus import SPLITS, Corpus
from decoders.errors import CorpusError
from decoders.manifest import Manifest, stage

BATCH = 64  # documents a tokenizer call
MINIMUM = 5_000  # tokens a split needs to say anything


def write_tokens(out: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, manifest: Manifest) -> Path:
    """Write `<split>.npy` (uint16 or uint32, [tokens]) for every split into `out`. Raises CorpusError on a split that is too small."""
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        for split in SPLITS:
            ids = encode(tokenizer, corpus.documents(split), f"tokens {split}")
            if len(ids) < MINIMUM:
                raise CorpusError(f"corpus {corpus.name}: split {split} has {len(ids):,} tokens, wanted at least {MINIMUM:,}; add text")
            np.save(folder / f"{split}.npy", ids)
    return out


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], what: str) -> NDArray[np.unsignedinteger]:
    """Tokenize documents into one flat array, each followed by the end-of-text id."""
    width = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts: list[NDArray[np.unsignedinteger]] = []
    with tqdm(desc=what, unit=" documents") as bar:
        for batch in _batched(documents):
            tokenized = tokenizer(batch, add_special_tokens=False)["input_ids"]
            parts.extend(np.array([*ids, tokenizer.eos_token_id], width) for ids in tokenized)
            bar.update(len(batch))
    return np.concatenate(parts) if parts else np.zeros(0, width)


def load_tokens(folder: Path, split: str) -> NDArray[np.unsignedinteger]:
    """Memory-map one split's token ids, [tokens]."""
    ids: NDArray[np.unsignedinteger] = np.load(folder / f"{split}.npy", mmap_mode="r")
    return ids


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH)):
        yield batch
