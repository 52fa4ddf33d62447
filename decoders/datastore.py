"""Stage 4: the kNN-LM datastore: one (key, value) a training token, embedded by a teacher tuned on the domain, and an index.

Key i is the teacher's final normed hidden state at position i, value i the token at position i + 1 (arXiv 2508.09874, eq. 1),
where positions are those of `tokens.npy`: the training text, or, when that is longer than the datastore may be, pieces spread evenly
over it, so that every part of the corpus is represented. The teacher is a base tuned on the domain first: a student learns nothing
from the targets of a teacher that is worse than itself.

Index by size: below SMALL entries the keys are searched exhaustively; above, `IVF<cells>,PQ<width/8>x4fs` with
about sqrt(entries) cells, whose candidates are re-ranked by their exact distances to the float16 keys: product-quantised distances
alone are known to hurt kNN-LM. An open datastore has the keys in memory: 2 * width bytes an entry, plus width / 16 + 8 for the index.
"""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from transformers import PreTrainedModel

from memdec.decoders import parallel
from memdec.decoders.arrays import fill_array
from memdec.decoders.manifest import Bookmark, Manifest, stage
from memdec.decoders.models import load_model
from memdec.decoders.reading.array_types import Ids, Keys
from memdec.decoders.reading.datastore import CHUNK
from memdec.decoders.reading.tokenizer import first_line
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import fast_precision, keep_freed_memory, progress

WINDOW, FRESH = 512, 384  # tokens per window, and how many of its last keys are kept: each key has at least 128 tokens of context
BATCH = 8  # windows embedded at a time
SMALL = 50_000
PIECE = 4096  # tokens of a piece

ValueOf = Callable[[Tensor, int], NDArray[Any]]
"""final hidden states [n, H] and the first one's position -> what is stored of them, [n, ...]"""


def write_datastore(out: Path, tokens: Path, teacher: Path, entries: int, manifest: Manifest) -> Path:
    """Embed at most about `entries` training tokens with the teacher, and index the keys."""
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        ids = spread(load_tokens(tokens, "train"), entries + 1)
        count = len(ids) - 1
        model = load_model(teacher)
        if parallel.rank() == 0:
            np.save(folder / "tokens.npy", ids[:count])
            np.save(folder / "values.npy", ids[1:])
        shape = (count, model.config.hidden_size)
        keys = fill_from_states(
            folder / "keys.npy", np.float16, shape, model, ids[:count], Bookmark(folder, "keys"), lambda hidden, _start: hidden.numpy()
        )
        parallel.barrier()
        if parallel.rank() == 0 and count >= SMALL:
            write_index(build_index(keys), folder / "index.faiss")
    return out


def spread(ids: Ids, most: int) -> Ids:
    """At most `most` of the tokens `ids` [tokens]: pieces of PIECE tokens (of `most`, if that is less), spread evenly and in order."""
    return ids if len(ids) <= most else np.concatenate([ids[start:stop] for start, stop in pieces(len(ids), most)])


def pieces(length: int, most: int) -> list[tuple[int, int]]:
    """Where the pieces of `spread` begin and end in a text of `length` tokens."""
    if length <= most:
        return [(0, length)]
    size = min(PIECE, most)
    return [(start, start + size) for start in np.linspace(0, length - size, max(1, most // PIECE)).astype(np.int64).tolist()]


def windows(length: int) -> int:
    """Number of windows that cover `length` tokens.

    Window w begins at w * FRESH; all but the first give only the keys of their last FRESH tokens.
    """
    return max(1, -(-(length - (WINDOW - FRESH)) // FRESH))


def embed(model: PreTrainedModel, ids: Ids, what: str, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """Embed windows [begin, end) of `ids` [tokens], BATCH at a time; yields (windows done, position, keys [n, width] float32).

    All windows together cover every position once, in order. If `begin` is a multiple of BATCH, the batches are those of an
    uninterrupted run, so the keys are bit-identical.
    """
    keep_freed_memory()
    overlap = WINDOW - FRESH
    end = windows(len(ids)) if end is None else end
    with torch.inference_mode(), progress(what, end * FRESH, " tokens", begin * FRESH) as bar:
        for first in range(begin, end, BATCH):
            last = min(first + BATCH, end)
            hidden = _hidden(model, ids, [w * FRESH for w in range(first, last)])
            parts = [h[overlap if w else 0 : len(ids) - w * FRESH] for w, h in zip(range(first, last), hidden, strict=True)]
            yield last, first * FRESH + (overlap if first else 0), torch.cat(parts)
            bar.update((last - first) * FRESH)


def fill_from_states(
    path: Path, dtype: DTypeLike, shape: tuple[int, ...], model: PreTrainedModel, ids: Ids, mark: Bookmark, value_of: ValueOf
) -> Any:
    """Fill an array on disk, [tokens, ...], with what `value_of` makes of each token's final hidden state; returns it, memory-mapped.

    Goes on where `mark` says that an earlier run stopped; of several processes, each fills its share.
    """
    if parallel.rank() == 0:
        fill_array(path, dtype, shape)
    parallel.barrier()
    array = fill_array(path, dtype, shape)
    begin, end = parallel.share(windows(len(ids)), BATCH)
    for done, start, hidden in embed(model, ids, path.stem, mark.place.get("windows", begin), end):
        array[start : start + len(hidden)] = value_of(hidden, start)
        if mark.due:
            array.flush()
            mark.move(windows=done)
    array.flush()
    mark.move(windows=end)
    return array


def _hidden(model: PreTrainedModel, ids: Ids, starts: list[int]) -> Tensor:
    """Final normed hidden states of the windows at `starts`, [windows, WINDOW, width]; short windows are padded at the end."""
    batch = np.zeros((len(starts), WINDOW), np.int64)
    for row, start in enumerate(starts):
        window = ids[start : start + WINDOW]
        batch[row, : len(window)] = window
    device = next(model.parameters()).device
    precision = fast_precision(device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        hidden: Tensor = model.base_model(input_ids=torch.from_numpy(batch).to(device), use_cache=False).last_hidden_state
    return hidden.float().cpu()


def build_index(keys: Keys) -> faiss.Index:
    """Train and fill the IVF-PQ index over keys [entries, width] (see the top of this file), without exact re-ranking."""
    count, width = keys.shape
    cells = 1 << int(np.log2(np.sqrt(count)))
    index: faiss.Index = faiss.index_factory(width, f"IVF{cells},PQ{width // 8}x4fs")
    sample = np.random.default_rng(0).choice(count, min(count, 64 * cells), replace=False)
    index.train(np.asarray(keys[np.sort(sample)], np.float32))
    for start in range(0, count, CHUNK):
        index.add(np.asarray(keys[start : start + CHUNK], np.float32))
    return index


def write_index(index: faiss.Index, path: Path) -> None:
    """Write an index. Raises OSError, into which faiss's RuntimeError is translated."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(errno.EIO, f"the index could not be written ({first_line(error)}); is the disk full?", str(path)) from None
