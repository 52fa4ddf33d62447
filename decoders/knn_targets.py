"""Stage 5: the kNN targets: the retriever's next-token distribution at every datastore position, which the decoder learns to imitate.

Two kinds of target: ``knn``, the neighbours' distribution alone, as in the paper (eq. 2); ``knn-lm``, the whole kNN-LM,
lambda * p_kNN + (1 - lambda) * p_teacher, which also covers tokens that no neighbour has.

Either may have what an n-gram memory of the text says mixed in, its own occurrence left out (`memdec.decoders.ngram_targets`).

k, tau and lambda are those with which the kNN-LM, mixed into the teacher, has the lowest perplexity on the validation split. A query's own
entry is dropped by its number, wherever it ranks. Rows are sparse: the KEPT most probable tokens and their probabilities, most probable
first; the rest of the probability belongs to the tokens that the row doesn't list.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from memdec.decoders import parallel
from memdec.decoders.arrays import fill_array
from memdec.decoders.datastore import pieces
from memdec.decoders.head import Head
from memdec.decoders.knn_lm import Tuned, add_up, token_masses, tune
from memdec.decoders.manifest import Bookmark, Manifest, stage, write_whole
from memdec.decoders.models import load_model
from memdec.decoders.ngram_targets import LeftOut
from memdec.decoders.perplexity import score, scored, windows
from memdec.decoders.reading.array_types import Floats, Ids, Keys, Numbers
from memdec.decoders.reading.datastore import Datastore
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import progress

KINDS = ("knn", "knn-lm")
KEPT = 64  # tokens per row
TUNED_ON = 64  # validation windows, of 256 scored tokens each, on which k, tau and lambda are tuned
BATCH = 8192  # queries at a time


@dataclass(frozen=True)
class Kind:
    """The kind of targets, and what goes into them."""

    name: str
    """One of KINDS."""
    most: int
    """Largest k tried."""
    ngrams: Path
    """Package of the text's n-gram memory; read only if it has a weight."""
    weight: float = 0.0
    """Weight of the n-gram memory's part; 0: without it."""

    def left_out(self) -> LeftOut | None:
        """The n-gram memory's leave-one-out distributions; None without a weight."""
        return LeftOut.open(self.ngrams, KEPT) if self.weight else None


def write_targets(out: Path, store: Path, teacher: Path, tokens: Path, kind: Kind, manifest: Manifest) -> Path:
    """Write the targets, ids.npy (dtype of the tokens) and probs.npy (float16), both [entries, KEPT], and tuned.json: k, tau and lambda."""
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        datastore = Datastore.open(store)
        if parallel.rank() == 0 and not (folder / "tuned.json").is_file():
            tuned = tune_beside_teacher(datastore, teacher, load_tokens(tokens, "valid"), kind.most)
            write_whole(folder / "tuned.json", json.dumps(tuned.to_dict(), indent=1) + "\n")
        parallel.barrier()
        chosen = json.loads((folder / "tuned.json").read_text())
        shape = (len(datastore.keys), KEPT)
        if parallel.rank() == 0:
            fill_array(folder / "ids.npy", datastore.values.dtype, shape)
            fill_array(folder / "probs.npy", np.float16, shape)
        parallel.barrier()
        ids, probs = fill_array(folder / "ids.npy", datastore.values.dtype, shape), fill_array(folder / "probs.npy", np.float16, shape)
        head, ngrams = Head.of(load_model(teacher)) if kind.name == "knn-lm" else None, kind.left_out()
        places = places_of(len(load_tokens(tokens, "train")), shape[0])
        mark = Bookmark(folder, "rows")
        begin, end = parallel.share(shape[0], BATCH)
        for start, distances, numbers in search_own(datastore, chosen["neighbours"], mark.place.get("rows", begin), end):
            part = slice(start, start + len(numbers))
            rows = token_masses(distances, datastore.values[numbers], chosen["tau"])
            if head is not None:
                rows = beside_teacher(*rows, chosen["lam"], datastore.keys[part], head)
            if ngrams is not None:
                rows = ngrams.beside(*rows, places[part], kind.weight)
            ids[part], probs[part] = sparse_rows(*rows)
            if mark.due:
                ids.flush()
                probs.flush()
                mark.move(rows=part.stop)
        ids.flush()
        probs.flush()
        mark.move(rows=end)
    return out


def places_of(length: int, entries: int) -> Numbers:
    """Where the datastore's entries are in a training text of `length` tokens, [entries]."""
    places: Numbers = np.concatenate([np.arange(start, stop) for start, stop in pieces(length, entries + 1)])
    return places[:entries]


def tune_beside_teacher(store: Datastore, folder: Path, valid: Ids, most: int) -> Tuned:
    """The kNN-LM, with k at most `most`, that has the lowest perplexity on `valid` [tokens] when mixed into the teacher.

    It is tuned on TUNED_ON windows spread evenly over the split, so that many documents count.
    """
    starts = windows(len(valid), TUNED_ON)
    logprobs, queries = score(load_model(folder), valid, "tau queries", starts, keys=True)
    distances, numbers = store.search(queries, min(most, len(store.keys)))
    hits = store.values[numbers] == np.asarray(valid)[scored(starts)][:, None]
    return tune(distances, hits, np.exp(logprobs), tuple(most >> (2 * i) for i in range(4) if most >> (2 * i)))


def search_own(store: Datastore, neighbours: int, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Floats, Numbers]]:
    """For entries [begin, end), their nearest *other* entries: yields (first entry, distances [n, k], numbers [n, k])."""
    end = len(store.keys) if end is None else end
    k = min(neighbours, len(store.keys) - 1)
    with progress("kNN targets", end, " queries", begin) as bar:
        for start in range(begin, end, BATCH):
            queries = np.asarray(store.keys[start : min(end, start + BATCH)], np.float32)
            distances, numbers = store.search(queries, k + 1)
            own = numbers == np.arange(start, start + len(queries))[:, None]
            own[~own.any(1), -1] = True  # own entry not among them: drop the farthest instead
            yield start, distances[~own].reshape(-1, k), numbers[~own].reshape(-1, k)
            bar.update(len(queries))


@torch.inference_mode()
def beside_teacher(ids: Ids, masses: Floats, lam: float, keys: Keys, head: Head) -> tuple[Ids, Floats]:
    """lam * p_kNN (rows [n, k]) + (1 - lam) * p_teacher (its KEPT most probable tokens), as rows [n, k + KEPT].

    The teacher's distribution comes from its keys [n, width], which are its final hidden states, and its output head.
    """
    tokens, probs = [], []
    for start in range(0, len(keys), 1024):
        hidden = torch.from_numpy(np.asarray(keys[start : start + 1024], np.float32)).to(head.weight.device)
        top = head.logits(hidden).softmax(1).topk(min(KEPT, len(head.weight)))
        tokens.append(top.indices.cpu().numpy().astype(ids.dtype))
        probs.append(top.values.cpu().numpy())
    return add_up(np.concatenate([ids, np.concatenate(tokens)], 1), np.concatenate([lam * masses, (1 - lam) * np.concatenate(probs)], 1))


def sparse_rows(ids: Ids, masses: Floats) -> tuple[Ids, np.ndarray[tuple[int, ...], np.dtype[np.float16]]]:
    """The KEPT most probable tokens of each row [n, k]; rows with fewer are padded with probability 0."""
    if ids.shape[1] < KEPT:
        pad = ((0, 0), (0, KEPT - ids.shape[1]))
        ids, masses = np.pad(ids, pad), np.pad(masses, pad)
    top = np.argsort(-masses, 1, kind="stable")[:, :KEPT]
    return np.take_along_axis(ids, top, 1), np.take_along_axis(masses, top, 1).astype(np.float16)
