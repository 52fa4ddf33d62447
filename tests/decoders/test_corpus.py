"""Splits that never move, and text that can't be used."""

from pathlib import Path

import pytest

from decoders.corpus import SPLITS, Corpus, split_of
from decoders.errors import CorpusError


def test_every_document_is_in_one_split_and_stays_there(tmp_path: Path) -> None:
    """Adding a file moves no other."""
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(f"document number {i}\n")
    before = {split: list(Corpus.open(str(tmp_path)).documents(split)) for split in SPLITS}
    assert sum(len(d) for d in before.values()) == 300
    assert all(before.values())
    (tmp_path / "0000.md").write_text("a new one\n")
    for split in SPLITS:
        assert set(before[split]) <= set(Corpus.open(str(tmp_path)).documents(split))


def test_ready_made_splits_are_kept(tmp_path: Path) -> None:
    """Documents are separated by one blank line."""
    (tmp_path / "train.txt").write_text("one\nmore\n\ntwo\n")
    (tmp_path / "valid.txt").write_text("three\n")
    assert list(Corpus.open(str(tmp_path)).documents("train")) == ["one\nmore\n", "two\n"]
    with pytest.raises(CorpusError, match=r"test\.txt"):
        list(Corpus.open(str(tmp_path)).documents("test"))


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    """File, offset and byte."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match=r"latin\.txt: not UTF-8 at byte 3 \(0xe9\)"):
        Corpus.open(str(tmp_path)).fingerprint()


def test_a_missing_folder_is_named() -> None:
    """And what is wanted instead."""
    with pytest.raises(CorpusError, match="/nowhere"):
        Corpus.open("/nowhere")


def test_the_standard_library_is_a_corpus() -> None:
    """Python files only, tests left out."""
    corpus = Corpus.open("stdlib")
    assert sum(len(d) for d in corpus.documents("train")) > 1_000_000
    assert split_of("x") in SPLITS
