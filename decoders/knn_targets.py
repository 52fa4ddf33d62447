"""Stage 4: what the decoder learns to imitate: a kNN-LM's next-token distribution at every datastore position.

    p_kNN(y) is proportional to the sum over neighbours i with v_i = y of exp(-d_i / tau)      (arXiv 2508.09874, eq. 2)

d is the squared L2 distance. A query's own entry is dropped by its id, wherever it ranks. Rows are sparse: token ids and
probabilities, most probable first, never a dense row over the vocabulary.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from decoders.arrays import create_array
from decoders.datastore import Datastore, embed
from decoders.manifest import Manifest, stage
from decoders.models import load_model
from decoders.tokens import load_tokens

KEPT = 32  # tokens a row; the rest of the mass is spread over them
TAUS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LAMBDAS = tuple(round(0.05 * i, 2) for i in range(1, 20))
PROBED = 16  # index cells a query visits
REFINED = 4  # candidates re-ranked, as a multiple of k
TUNED_ON = 16_384  # validation positions that choose tau
BATCH = 8192  # queries at a time

Floats = NDArray[np.float32]


def write_targets(out: Path, store: Path, tokens: Path, neighbours: int, manifest: Manifest) -> Path:
    """Write ids.npy and probs.npy, both [entries, KEPT] (uint32 would be rare: ids keep the tokens' type; probs float16)."""
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        datastore = Datastore.open(store)
        tau, tried = tune_tau(datastore, load_tokens(tokens, "valid")[:TUNED_ON], neighbours)
        (folder / "tau.json").write_text(json.dumps({"tau": tau, "tried": tried}, indent=1) + "\n")
        count = len(datastore.keys)
        ids = create_array(folder / "ids.npy", datastore.values.dtype, (count, KEPT))
        probs = create_array(folder / "probs.npy", np.float16, (count, KEPT))
        for start, distances, found in search_own(datastore, neighbours):
            part = slice(start, start + len(found))
            ids[part], probs[part] = sparse_rows(*token_masses(distances, datastore.values[found], tau))
        ids.flush()
        probs.flush()
    return out


def search(index: faiss.Index, queries: Floats, neighbours: int) -> tuple[Floats, NDArray[np.int64]]:
    """Squared distances and entry ids, both [queries, neighbours], re-ranked exactly where the index is approximate."""
    parameters: dict[str, Any] = {}
    if isinstance(index, faiss.IndexRefine):
        library: Any = faiss  # its stubs lack the parameters' keywords
        inner = library.SearchParametersIVF(nprobe=PROBED)
        parameters["params"] = library.IndexRefineSearchParameters(k_factor=REFINED, base_index_params=inner)
    distances, found = index.search(queries, neighbours, **parameters)
    return distances, found


def search_own(store: Datastore, neighbours: int) -> Iterator[tuple[int, Floats, NDArray[np.int64]]]:
    """For every entry, its nearest *other* entries: yields (first entry, distances [n, k], ids [n, k])."""
    count = len(store.keys)
    k = min(neighbours, count - 1)
    with tqdm(total=count, desc="kNN targets", unit=" queries", unit_scale=True, mininterval=5) as bar:
        for start in range(0, count, BATCH):
            queries = np.asarray(store.keys[start : start + BATCH], np.float32)
            distances, found = search(store.index, queries, k + 1)
            own = found == np.arange(start, start + len(queries))[:, None]
            own[~own.any(1), -1] = True  # own entry not among them: drop the farthest instead
            yield start, distances[~own].reshape(-1, k), found[~own].reshape(-1, k)
            bar.update(len(queries))


def token_masses(distances: Floats, tokens: NDArray[np.unsignedinteger], tau: float) -> tuple[NDArray[np.unsignedinteger], Floats]:
    """Eq. 2 without densifying: token ids and probabilities, both [n, k]; unused places hold probability 0.

    Neighbours the index didn't find come as infinite distances (faiss pads with 3.4e38) and get no mass.
    """
    logits = -(distances - distances.min(1, keepdims=True)) / tau
    weights = np.exp(logits)
    weights /= weights.sum(1, keepdims=True)
    order = np.argsort(tokens, 1, kind="stable")
    ordered, weights = np.take_along_axis(tokens, order, 1), np.take_along_axis(weights, order, 1)
    group = np.zeros(ordered.shape, np.int64)
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=group[:, 1:])
    rows = np.arange(len(ordered))[:, None]
    masses, ids = np.zeros(ordered.shape, np.float32), np.zeros(ordered.shape, ordered.dtype)
    np.add.at(masses, (np.broadcast_to(rows, group.shape), group), weights)
    ids[rows, group] = ordered
    return ids, masses


def sparse_rows(ids: NDArray[np.unsignedinteger], masses: Floats) -> tuple[NDArray[np.unsignedinteger], NDArray[np.float16]]:
    """The KEPT most probable tokens of each row [n, k], renormalised; rows with fewer are padded with probability 0."""
    if ids.shape[1] < KEPT:
        pad = ((0, 0), (0, KEPT - ids.shape[1]))
        ids, masses = np.pad(ids, pad), np.pad(masses, pad)
    top = np.argsort(-masses, 1, kind="stable")[:, :KEPT]
    kept = np.take_along_axis(masses, top, 1)
    return np.take_along_axis(ids, top, 1), (kept / kept.sum(1, keepdims=True)).astype(np.float16)


def tune_tau(store: Datastore, valid: NDArray[np.unsignedinteger], neighbours: int) -> tuple[float, list[dict[str, float]]]:
    """The tau whose kNN-LM, mixed into the teacher at its own best lambda, has the lowest validation perplexity."""
    teacher = load_model(store.teacher)
    queries = torch.cat([keys for _, keys in embed(teacher, valid, "tau queries")])[:-1]
    labels = valid[1:]
    p_teacher = label_probabilities(queries, teacher.get_output_embeddings().weight, labels)
    distances, found = search(store.index, queries.numpy(), min(neighbours, len(store.keys)))
    hit = store.values[found] == labels[:, None]
    tried = []
    for tau in TAUS:
        weights = np.exp(-(distances - distances.min(1, keepdims=True)) / tau)
        p_knn = (weights * hit).sum(1) / weights.sum(1)
        nats = {lam: float(-np.log(lam * p_knn + (1 - lam) * p_teacher).mean()) for lam in LAMBDAS}
        best = min(nats, key=nats.__getitem__)
        tried.append({"tau": tau, "lambda": best, "perplexity": round(float(np.exp(nats[best])), 3)})
    return min(tried, key=lambda row: row["perplexity"])["tau"], tried


@torch.inference_mode()
def label_probabilities(hidden: Tensor, weight: Tensor, labels: NDArray[np.unsignedinteger]) -> NDArray[np.float64]:
    """Softmax probability of labels [n] under hidden [n, H] @ weight.T, chunk by chunk."""
    wanted = torch.from_numpy(labels.astype(np.int64))
    parts = []
    for start in range(0, len(hidden), 1024):
        logits = hidden[start : start + 1024] @ weight.T
        parts.append(logits.log_softmax(1).gather(1, wanted[start : start + 1024, None]).squeeze(1))
    return torch.cat(parts).double().exp().numpy()
