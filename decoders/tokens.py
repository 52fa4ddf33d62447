"""Stage 2: token ids on disk, one flat array a split, `<|endoftext|>` after each document.

Position i of a split is the id of its i-th token; everything later (datastore entries, kNN targets) is indexed by it.
`<split>.ends.npy` holds where each document ends, its end-of-text included.
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

BATCH = 64  # documents a tokenizer call
MINIMUM = 5_000  # tokens a split needs to say anything


def write_tokens(out: Path, corpus: Cleaned, tokenizer: PreTrainedTokenizerBase, manifest: Manifest) -> Path:
    """Write `<split>.npy` (uint16 or uint32, [tokens]) for every split into `out`. Raises CorpusError on a split that is too small."""
    with stage(out, manifest) as folder:
        if folder is None or parallel.rank() != 0:
            return out
        for split in reversed(SPLITS):  # the small ones first: too little text is told at once
            total = encode(tokenizer, corpus.documents(split), folder, split)
            if total < MINIMUM:
                shutil.rmtree(folder)  # nothing in it is worth going on with
                few = f"corpus {corpus.corpus.name}: split {split} has {total:,} tokens, wanted at least {MINIMUM:,}"
                raise CorpusError(
                    f"{few}; add documents (2 % of them become {split}, unless train.txt, valid.txt and test.txt say otherwise)"
                )
    return out


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], folder: Path, split: str) -> int:
    """Tokenize one split into `folder`, going on where an earlier run stopped; returns its length in tokens.

    Text that spells a special token stays text.
    """
    mark = Bookmark(folder, split)
    ids = GrowingArray(folder / f"{split}.npy", np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32, mark.place.get("tokens", 0))
    ends = GrowingArray(folder / f"{split}.ends.npy", np.int64, mark.place.get("documents", 0))
    with tqdm(desc=f"tokens {split}", unit=" documents", initial=ends.length) as bar:
        for batch in _batched(islice(documents, ends.length, None)):
            for row in tokenizer(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
                ids.append(np.array([*row, tokenizer.eos_token_id]))
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
    """Where each document of a split ends, [documents]."""
    ends: NDArray[np.int64] = np.load(folder / f"{split}.ends.npy")
    return ends


def _batched(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH)):
        yield batch
