"""Leave-one-out n-gram targets against plain counting: the memory that never saw the one occurrence."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ngrams import LONGEST, Reference, make_memory, random_documents

from memdec.decoders.datastore import PIECE, spread
from memdec.decoders.knn_targets import places_of
from memdec.decoders.ngram_targets import LeftOut
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.reading.ngram_index import Vocabulary

END, SIZE = 0, 30
TOYS = Vocabulary(SIZE, "0123abcd", END)
ALL = SIZE  # tokens of a row: none is cut off
WEIGHTS = [0.2, 0.5, 0.4, 1.0, 0.9, 1.0, 0.3]


def without(whole: Reference, text: list[int], place: int) -> Reference:
    """The same counts but for one: of the token behind `place`, after each context that ends there. The discounts stay."""
    left = Reference([], whole.end, whole.order, whole.shortest, whole.weights)
    left.after, left.discounts = dict(whole.after), whole.discounts
    start = place + 1 - text[: place + 1][::-1].index(END) if END in text[: place + 1] else 0
    for length in range(min(place + 1 - start, LONGEST - 1) + 1):
        context, after = tuple(text[place + 1 - length : place + 1]), Counter(text[place + 1 : place + 2])
        left.after[context] = left.after[context] - after
        if not left.after[context]:
            del left.after[context]
    return left


def dense(ids: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Sparse rows [n, k] as [n, SIZE]."""
    result = np.zeros((len(ids), SIZE))
    np.add.at(result, (np.arange(len(ids))[:, None], ids), probs)
    return result


@pytest.mark.parametrize(("order", "shortest"), [(2, 1), (4, 2), (7, 3), (8, 1)])
def test_equals_counting_without_the_occurrence(tmp_path: Path, order: int, shortest: int) -> None:
    """At every position: document starts, ends and copies of a document included; beside a kNN target as beside a base."""
    documents = {**random_documents(order, 12, 40, SIZE), "copy": [], "one": [7], "two": [7, 8], "new": [29, 28, 27, 29]}
    documents["copy"] = documents["document-3"]
    weights = WEIGHTS if order > 4 else [1.0] * 7
    memory = make_memory(tmp_path / "m", documents, TOYS, order=order, shortest=shortest, weights=weights)
    whole = Reference(list(documents.values()), END, order, shortest, weights)
    text = [token for row in documents.values() for token in [*row, END]]
    random, places = np.random.default_rng(0), np.arange(len(text))
    knn = random.dirichlet(np.ones(SIZE), len(text)).astype(np.float32)
    found = LeftOut(memory, ALL).beside(np.tile(np.arange(SIZE, dtype=np.uint16), (len(text), 1)), knn, places, 0.3)
    for place, row in enumerate(dense(*found)):
        said = without(whole, text, place).distribution(text[: place + 1], knn[place].tolist())
        np.testing.assert_allclose(row, 0.7 * knn[place] + 0.3 * np.array(said), atol=1e-6, err_msg=str(place))


def test_rows_keep_the_likeliest_with_their_probabilities(tmp_path: Path) -> None:
    """Whatever is cut off; most probable first, and what is left to the kNN target is that of the whole row."""
    documents = random_documents(1, 30, 60, SIZE)
    memory, places = make_memory(tmp_path / "m", documents, TOYS, order=5), np.arange(500)
    ids, probs, left = LeftOut(memory, ALL).rows(places)
    few, theirs, same = LeftOut(memory, 4).rows(places)
    np.testing.assert_allclose(theirs, probs[:, :4], atol=1e-12)
    np.testing.assert_allclose(dense(ids, probs)[np.arange(500)[:, None], few] * (theirs > 0), theirs, atol=1e-12)
    assert (np.diff(theirs, axis=1) <= 0).all() and (left == same).all()
    np.testing.assert_allclose(probs.sum(1) + left, 1, atol=1e-12)


def test_what_occurs_once_says_nothing(tmp_path: Path) -> None:
    """The target is the kNN target; where a copy of the document is there, the memory knows what follows."""
    once = make_memory(tmp_path / "once", {"a": [1, 2, 3, 4, 5]}, TOYS)
    assert (LeftOut(once, ALL).rows(np.arange(6))[2] == 1).all()
    twice = make_memory(tmp_path / "twice", {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3, 4, 5]}, TOYS)
    ids, probs, left = LeftOut(twice, ALL).rows(np.arange(6))
    assert ids[:5, 0].tolist() == [2, 3, 4, 5, END] and (left[:5] < 1).all() and left[5] == 1
    assert (probs[:5, 1:] == 0).all()


def test_several_shards_are_refused(tmp_path: Path) -> None:
    """One line that names the option."""
    memory = make_memory(tmp_path / "m", random_documents(1, 4, 20, SIZE), TOYS, shards=2)
    with pytest.raises(OptionError, match="has 2 shards, wanted one"):
        LeftOut(memory, ALL)


@pytest.mark.parametrize("entries", [100, PIECE, 30_000, 99_999, 200_000])
def test_entries_are_found_in_the_text(entries: int) -> None:
    """Those of a datastore that has pieces of it, too."""
    text = np.arange(100_000, dtype=np.uint32)
    taken = spread(text, entries + 1)[:-1]
    assert (text[places_of(len(text), len(taken))] == taken).all()
