"""Stage 3: the kNN-LM datastore: a teacher tuned on the domain, one (key, value) a training token, and an index.

Key i is the teacher's final normed hidden state at position i, value i the token at position i + 1 (arXiv 2508.09874, eq. 1).
The teacher is the base tuned on the domain first: targets from a teacher worse than its student hurt.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from decoders.arrays import create_array
from decoders.manifest import Manifest, stage
from decoders.models import load_model
from decoders.tokenizer import first_line
from decoders.tokens import load_tokens
from decoders.train import Ids, Schedule, keep_freed_memory, train

WINDOW, FRESH = 512, 384  # tokens a window, and how many of its last keys are kept: no key has seen fewer than 128 tokens
BATCH = 8  # windows embedded at a time


@dataclass(frozen=True)
class Datastore:
    """An open datastore. keys [entries, hidden] float16 and values [entries] stay on disk until read."""

    keys: NDArray[np.float16]
    values: Ids
    index: faiss.Index
    teacher: Path

    @classmethod
    def open(cls, folder: Path) -> "Datastore":
        """Memory-map the arrays and load the index."""
        index = faiss.read_index(str(folder / "index.faiss"))
        return cls(np.load(folder / "keys.npy", mmap_mode="r"), np.load(folder / "values.npy", mmap_mode="r"), index, folder / "teacher")


def write_datastore(out: Path, tokens: Path, base: Path, tuning: Schedule, entries: int, manifest: Manifest) -> Path:
    """Tune a copy of the base on the domain, embed the first `entries` training tokens with it, index the keys."""
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        ids = load_tokens(tokens, "train")
        teacher = load_model(base)
        train(teacher, ids, tuning, "teacher", log=folder / "training.jsonl")
        teacher.save_pretrained(folder / "teacher")
        count = min(entries, len(ids) - 1)
        keys = create_array(folder / "keys.npy", np.float16, (count, teacher.config.hidden_size))
        for start, part in embed(teacher, ids[:count], "datastore"):
            keys[start : start + len(part)] = part.numpy().astype(np.float16)
        keys.flush()
        np.save(folder / "values.npy", ids[1 : count + 1])
        write_index(build_index(keys), folder / "index.faiss")
    return out


def embed(model: PreTrainedModel, ids: Ids, what: str) -> Iterator[tuple[int, Tensor]]:
    """Yield (position, keys [n, hidden] float32) covering every position of `ids` [tokens] once, in order."""
    keep_freed_memory()
    starts = list(range(0, max(1, len(ids) - (WINDOW - FRESH)), FRESH))
    with torch.inference_mode(), tqdm(total=len(ids), desc=what, unit=" tokens", unit_scale=True, mininterval=5) as bar:
        for group in range(0, len(starts), BATCH):
            for start, hidden in zip(starts[group : group + BATCH], _hidden(model, ids, starts[group : group + BATCH]), strict=True):
                seen = 0 if start == 0 else WINDOW - FRESH
                part = hidden[seen : len(ids) - start]
                yield start + seen, part
                bar.update(len(part))


def _hidden(model: PreTrainedModel, ids: Ids, starts: list[int]) -> Tensor:
    """Final normed hidden states of the windows at `starts`, [windows, WINDOW, hidden]; short windows are padded at the end."""
    batch = np.zeros((len(starts), WINDOW), np.int64)
    for row, start in enumerate(starts):
        window = ids[start : start + WINDOW]
        batch[row, : len(window)] = window
    hidden: Tensor = model.base_model(input_ids=torch.from_numpy(batch), use_cache=False).last_hidden_state
    return hidden.float()


def build_index(keys: NDArray[np.float16]) -> faiss.Index:
    """An index over keys [entries, hidden] that re-ranks its candidates with the exact float16 keys.

    Product-quantised distances alone are known to spoil kNN-LM. Small stores are searched exhaustively.
    """
    count, width = keys.shape
    index: faiss.Index
    if count < 50_000:
        index = faiss.IndexFlatL2(width)
    else:
        cells = 1 << int(np.log2(np.sqrt(count)))
        index = faiss.index_factory(width, f"IVF{cells},PQ{width // 8}x4fs,Refine(SQfp16)")
        sample = np.random.default_rng(0).choice(count, min(count, 64 * cells), replace=False)
        index.train(np.asarray(keys[np.sort(sample)], np.float32))
    for start in range(0, count, 100_000):
        index.add(np.asarray(keys[start : start + 100_000], np.float32))
    return index


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index. Raises OSError where faiss raises a RuntimeError of its own."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(errno.EIO, f"the index could not be written ({first_line(error)}); is the disk full?", str(path)) from None
