"""Training text that repeats held-out text is found and left out."""

import json
from pathlib import Path

import numpy as np
import pytest

from memdec.decoders.corpus import Corpus
from memdec.decoders.near_duplicates import Cleaned, grams_of, share_of, write_near_duplicates

WORDS = [f"word{i}" for i in range(4000)]


def text(seed: int, length: int = 200) -> str:
    """Random words."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, length)) + "\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """One training document of five half-repeats a test document, one repeats a valid one whole, one valid repeats a test one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    half = text(1).rsplit(" ", 100)[0] + " " + text(2, 100)
    splits = {"train": [half, text(3), text(4), text(11), text(5)], "valid": [text(11), text(12), text(1)], "test": [text(1), text(21)]}
    for split, documents in splits.items():
        (folder / f"{split}.txt").write_text("\n".join(documents))
    return Corpus.open(str(folder))


def test_repeats_are_dropped_and_counted(corpus: Corpus, tmp_path: Path) -> None:
    """Test is never touched, valid is cleaned of test, train of both."""
    out = write_near_duplicates(tmp_path / "near_duplicates", corpus, {})
    kept = Cleaned.open(corpus, out)
    assert list(kept.documents("train")) == [text(3), text(4), text(5)]
    assert list(kept.documents("valid")) == [text(11), text(12)]
    assert list(kept.documents("test")) == [text(1), text(21)]
    counts = json.loads((out / "counts.json").read_text())
    assert counts == {
        "test": {"documents": 2, "dropped": 0},
        "valid": {"documents": 3, "dropped": 1},
        "train": {"documents": 5, "dropped": 2},
    }


def test_shares_equal_the_obvious_computation() -> None:
    """Against sets of tuples of words."""
    one, other = text(1), text(1).rsplit(" ", 77)[0]
    sets = [{tuple(w[i : i + 13]) for i in range(len(w) - 12)} for w in (one.split(), other.split())]
    assert len(grams_of(one)) == len(sets[0])
    assert share_of(grams_of(one), grams_of(other)) == pytest.approx(len(sets[0] & sets[1]) / len(sets[0]))
    assert share_of(grams_of(""), grams_of(one)) == 0
