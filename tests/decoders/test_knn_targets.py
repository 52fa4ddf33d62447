"""kNN distributions against a dense, obvious computation."""

from pathlib import Path

import numpy as np
import pytest

from decoders.datastore import Datastore, build_index
from decoders.knn_targets import KEPT, search_own, sparse_rows, token_masses

VOCABULARY = 40


def store(entries: int, width: int = 16) -> Datastore:
    """A datastore of random keys, some of them equal."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(entries, width)).astype(np.float16)
    keys[5] = keys[3]  # an equal key is not the entry itself
    return Datastore(keys, random.integers(0, VOCABULARY, entries).astype(np.uint16), build_index(keys), Path("unused"))


def dense(datastore: Datastore, row: int, k: int, tau: float) -> np.ndarray:
    """Eq. 2 over the k nearest other entries, [V]."""
    keys = datastore.keys.astype(np.float64)
    distances = ((keys - keys[row]) ** 2).sum(1)
    distances[row] = np.inf
    nearest = np.argsort(distances, kind="stable")[:k]
    result = np.zeros(VOCABULARY)
    np.add.at(result, datastore.values[nearest], np.exp(-(distances[nearest] - distances[nearest].min()) / tau))
    return result / result.sum()


@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_targets_equal_the_equation(tau: float) -> None:
    """Own entry dropped by id, mass added up by token."""
    datastore = store(400)
    ((start, distances, found),) = search_own(datastore, 12)
    assert start == 0
    assert not (found == np.arange(400)[:, None]).any()
    ids, probs = sparse_rows(*token_masses(distances, datastore.values[found], tau))
    assert ids.shape == probs.shape == (400, KEPT)
    for row in (0, 3, 5, 399):
        ours = np.zeros(VOCABULARY)
        np.add.at(ours, ids[row], probs[row].astype(np.float64))
        np.testing.assert_allclose(ours, dense(datastore, row, 12, tau), atol=2e-3)


def test_missing_neighbours_get_no_mass() -> None:
    """faiss pads short lists with the largest float."""
    ids, masses = token_masses(np.array([[1.0, 3.4e38]], np.float32), np.array([[7, 9]], np.uint16), 1.0)
    assert dict(zip(ids[0].tolist(), masses[0].tolist(), strict=True)) == {7: 1.0, 9: 0.0}


def test_rows_with_many_tokens_keep_the_likeliest() -> None:
    """And are renormalised."""
    ids, probs = sparse_rows(np.arange(64, dtype=np.uint16)[None], (np.arange(64, dtype=np.float32) / 2016)[None])
    assert set(ids[0].tolist()) == set(range(32, 64))
    assert probs.astype(np.float64).sum() == pytest.approx(1, abs=2e-3)
