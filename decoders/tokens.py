"""Stage 2: tokenize the corpus: one flat array of token ids per split, with `<|endoftext|>` (or the tokenizer's own end) after each document.

Later artifacts (datastore entries, kNN targets) are indexed by positions in it.
`<split>.ends.npy` holds the position after each document, its end-of-text included.
"""

import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memdec.decoders import parallel
from memdec.decoders.arrays import GrowingArray
from memdec.decoders.corpus import SPLITS
from memdec.decoders.manifest import Bookmark, Manifest, stage
from memdec.decoders.near_duplicates import Cleaned
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.errors import CorpusError
from memdec.decoders.reading.tokenizer import end_of_document

BATCH = 64  # documents per tokenizer call
MINIMUM = 5_000  # tokens per split: fewer can't be measured on


def write_tokens(out: Path, corpus: Cleaned, tokenizer: PreTrainedTokenizerBase, manifest: Manifest) -> Path:
    """Write `<split>.npy` (uint16 or uint32, [tokens]) for every split into `out`. Raises CorpusError on a split that is too small."""
    with stage(out, manifest) as folder:
        if folder is None or parallel.rank() != 0:
            return out
        for split in reversed(SPLITS):  # the small splits first, so that too little text is reported at once
            total = encode(tokenizer, corpus.documents(split), folder, split)
            if total < MINIMUM:
                shutil.rmtree(folder)  # a later run must start from the beginning
                few = f"corpus {corpus.corpus.name}: split {split} has {total:,} tokens, wanted at least {MINIMUM:,}"
                raise CorpusError(
                    f"{few}; add documents (2 % of them become {split}, unless train.txt, valid.txt and test.txt say otherwise)"
                )
    return out


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], folder: Path, split: str) -> int:
    """Tokenize one split into `folder`, continuing where an earlier run stopped; returns its length in tokens.

    Special tokens spelled out in the text are tokenized as ordinary text.
    """
    mark, last = Bookmark(folder, split), end_of_document(tokenizer)
    ids = GrowingArray(folder / f"{split}.npy", np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32, mark.place.get("tokens", 0))
    ends = GrowingArray(folder / f"{split}.ends.npy", np.int64, mark.place.get("documents", 0))
    with tqdm(desc=f"tokens {split}", unit=" documents", initial=ends.length) as bar:
        for batch in _batched(islice(documents, ends.length, None)):
            for row in tokenizer(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
                ids.append(np.array([*row, last]))
                ends.append(np.array([ids.length]))
            bar.update(len(batch))
            if mark.due:
                ids.flush()
                ends.flush()
                mark.move(tokens=ids.length, documents=ends.length)
    ids.close()
    ends.close()
    mark.move(tokens=ids.length, documents=ends.length)
    return ids.length


def load_tokens(folder: Path, split: str) -> Ids:
    """Memory-map one split's token ids, [tokens]."""
    ids: Ids = np.load(folder / f"{split}.npy", mmap_mode="r")
    return ids


def load_ends(folder: Path, split: str) -> NDArray[np.int64]:
    """Position after each document of a split, [documents]."""
    ends: NDArray[np.int64] = np.load(folder / f"{split}.ends.npy")
    return ends


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH)):
        yield batch
