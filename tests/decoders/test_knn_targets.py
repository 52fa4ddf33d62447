"""kNN distributions against a dense, obvious computation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memdec.decoders import knn_targets
from memdec.decoders.datastore import PIECE, build_index, spread
from memdec.decoders.head import Head
from memdec.decoders.knn_lm import LAMBDAS, add_up, label_probability, token_masses, tune
from memdec.decoders.knn_targets import KEPT, beside_teacher, search_own, sparse_rows
from memdec.decoders.perplexity import scored
from memdec.decoders.reading.datastore import Datastore, with_exact_distances

VOCABULARY = 40


def store(entries: int, width: int = 16) -> Datastore:
    """A datastore of random keys, some of them equal."""
    random = np.random.default_rng(0)
    keys = random.normal(size=(entries, width)).astype(np.float16)
    keys[5] = keys[3]  # an equal key is not the entry itself
    return Datastore(keys, random.integers(0, VOCABULARY, entries).astype(np.uint16), with_exact_distances(None, keys))


def dense(datastore: Datastore, row: int, k: int, tau: float) -> np.ndarray:
    """Eq. 2 over the k nearest other entries, [V]."""
    keys = datastore.keys.astype(np.float64)
    distances = ((keys - keys[row]) ** 2).sum(1)
    distances[row] = np.inf
    nearest = np.argsort(distances, kind="stable")[:k]
    result = np.zeros(VOCABULARY)
    np.add.at(result, datastore.values[nearest], np.exp(-(distances[nearest] - distances[nearest].min()) / tau))
    normed: np.ndarray = result / result.sum()
    return normed


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
    """With their own probabilities: what is cut off is left to the rest."""
    masses = np.arange(2 * KEPT, dtype=np.float32)
    masses /= masses.sum()
    ids, probs = sparse_rows(np.arange(2 * KEPT, dtype=np.uint16)[None], masses[None])
    assert set(ids[0].tolist()) == set(range(KEPT, 2 * KEPT))
    np.testing.assert_allclose(probs[0], masses[ids[0]], rtol=1e-3)


def test_a_token_is_named_once() -> None:
    """Its masses add up; zeros fill the places left over."""
    ids, masses = add_up(np.array([[7, 3, 7, 3]], np.uint16), np.array([[0.1, 0.2, 0.3, 0.4]], np.float32))
    assert ids.tolist() == [[3, 7, 0, 0]]
    np.testing.assert_allclose(masses, [[0.6, 0.4, 0, 0]])


def test_the_approximate_index_ranks_by_exact_distances() -> None:
    """Whatever it finds comes with the distance to the float16 key, nearest first."""
    random = np.random.default_rng(1)
    keys = random.normal(size=(4000, 16)).astype(np.float16)
    queries = random.normal(size=(20, 16)).astype(np.float32)
    approximate = Datastore(keys, np.zeros(4000, np.uint16), with_exact_distances(build_index(keys), keys))
    distances, found = approximate.search(queries, 10)
    exact = ((keys[found].astype(np.float32) - queries[:, None]) ** 2).sum(2)
    np.testing.assert_allclose(distances, exact, rtol=1e-3, atol=1e-3)
    assert (np.diff(distances, axis=1) >= 0).all()
    whole, _ = Datastore(keys, approximate.values, with_exact_distances(None, keys)).search(queries, 10)
    assert (distances >= whole - 1e-3).all()


def test_tuning_finds_what_a_dense_search_over_the_grid_finds() -> None:
    """The lowest perplexity of all k, tau and lambda; nothing is gained where neighbours are never right."""
    random = np.random.default_rng(2)
    distances = np.sort(random.uniform(0, 50, (200, 16)), 1).astype(np.float32)
    hits = random.random((200, 16)) < np.linspace(0.6, 0.05, 16)
    base = random.uniform(0.01, 0.2, 200)
    best = tune(distances, hits, base, (4, 16))
    p = label_probability(distances, hits, best.neighbours, best.tau)
    assert np.exp(-np.log(best.lam * p + (1 - best.lam) * base).mean()) == pytest.approx(best.perplexity, rel=1e-3)
    assert best.perplexity == min(row["perplexity"] for row in best.tried)
    assert tune(distances, np.zeros_like(hits), base, (4, 16)).lam == 0


def test_the_whole_knn_lm_as_a_target() -> None:
    """lambda * p_kNN + (1 - lambda) * p_teacher, dense, against the sparse rows: only the teacher's tail is missing."""
    torch.manual_seed(0)
    keys, head = torch.randn(50, 16).numpy().astype(np.float16), 3 * torch.randn(VOCABULARY, 16)
    random = np.random.default_rng(3)
    neighbours = random.integers(0, VOCABULARY, (50, 6)).astype(np.uint16)
    masses = random.dirichlet(np.ones(6), 50).astype(np.float32)
    teacher = (torch.from_numpy(keys.astype(np.float32)) @ head.T).softmax(1).numpy()
    ids, probs = beside_teacher(neighbours, masses, 0.3, keys, Head(head))
    for row in range(50):
        expected = 0.7 * teacher[row]
        expected[np.argsort(-teacher[row])[KEPT:]] = 0
        np.add.at(expected, neighbours[row], 0.3 * masses[row])
        ours = np.zeros(VOCABULARY)
        np.add.at(ours, ids[row], probs[row])
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("most", [1, 100, 5000, 30_000, 99_999, 100_000, 200_000])
def test_a_datastore_covers_the_whole_text_evenly(most: int) -> None:
    """In order, no more than asked for, from the first token to the last; whole pieces."""
    ids = np.arange(100_000, dtype=np.uint32)
    taken = spread(ids, most)
    assert min(most, 100_000) - PIECE < len(taken) <= most
    if most >= 100_000:
        assert (taken == ids).all()
    elif most >= 2 * PIECE:
        assert taken[0] == 0 and taken[-1] == 99_999
        jumps = np.flatnonzero(np.diff(taken.astype(np.int64)) != 1) + 1
        assert (jumps % PIECE == 0).all()


def test_targets_are_tuned_on_windows_from_all_of_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of many documents would not do; and the labels are those of the windows."""
    valid = (np.arange(60_000) % VOCABULARY).astype(np.uint16)
    asked: list[int] = []

    def score(_model: None, ids: np.ndarray, _what: str, starts: list[int], keys: bool) -> tuple[np.ndarray, np.ndarray]:
        asked.extend(starts)
        places = scored(starts)
        assert keys and places.max() < len(ids)
        return np.log(np.full(len(places), 1 / VOCABULARY)), keys_of[ids[places]]

    keys_of = np.random.default_rng(0).normal(size=(VOCABULARY, 16)).astype(np.float32)
    # Each label's key has one entry, whose value is the label: retrieval is always right, if labels and queries belong together.
    found = Datastore(
        keys_of.astype(np.float16), np.arange(VOCABULARY).astype(np.uint16), with_exact_distances(None, keys_of.astype(np.float16))
    )
    monkeypatch.setattr(knn_targets, "load_model", lambda _: None)
    monkeypatch.setattr(knn_targets, "score", score)
    best = knn_targets.tune_beside_teacher(found, Path("teacher"), valid, 4)
    assert len(asked) == knn_targets.TUNED_ON and asked[0] == 0 and asked[-1] > 59_000
    assert best.lam == max(LAMBDAS) and best.perplexity < 1.1
