"""Splits that never move, and text that can't be used."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from memdec.decoders.corpus import SPLITS, Corpus, split_of
from memdec.decoders.reading.errors import CorpusError


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
    with pytest.raises(CorpusError, match="no test file"):
        list(Corpus.open(str(tmp_path)).documents("train"))
    (tmp_path / "test.txt").write_text("four\n")
    assert list(Corpus.open(str(tmp_path)).documents("train")) == ["one\nmore\n", "two\n"]


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


ROWS = [f"document number {i}, told at some length\n" for i in range(200)]


def as_lines(folder: Path, name: str) -> None:
    """ROWS as JSON lines, compressed as the name says."""
    data = "".join(json.dumps({"text": row, "id": i}) + "\n" for i, row in enumerate(ROWS)).encode()
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    (folder / name).write_bytes(packers.get(Path(name).suffix, bytes)(data))


def as_table(folder: Path, name: str) -> None:
    """ROWS as parquet, or as the arrow file that `datasets` saves."""
    table = pa.table({"id": range(len(ROWS)), "text": ROWS})
    if name.endswith(".parquet"):
        pq.write_table(table, folder / name)
    else:
        (folder / "state.json").write_text("{}")
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "data-00000-of-00001.arrow"])
def test_every_kind_of_file_holds_the_same_documents(name: str, tmp_path: Path) -> None:
    """Same splits, same fingerprint."""
    for folder, write in (("plain", as_lines), ("other", as_table if name.endswith(("parquet", "arrow")) else as_lines)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "a.jsonl" if folder == "plain" else name)
    plain, other = Corpus.open(str(tmp_path / "plain")), Corpus.open(str(tmp_path / "other"))
    assert sorted(row for split in SPLITS for row in other.documents(split)) == sorted(ROWS)
    assert other.fingerprint() == plain.fingerprint()


def test_folders_and_files_named_after_splits(tmp_path: Path) -> None:
    """As `datasets` lays them out; a script called train.py is no split."""
    for split in ("train", "validation", "test"):
        (tmp_path / "saved" / split).mkdir(parents=True)
        as_table(tmp_path / "saved" / split, "data-00000-of-00001.arrow")
    assert [len(list(Corpus.open(str(tmp_path / "saved")).documents(s))) for s in SPLITS] == [200, 200, 200]
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "train.py").write_text("pass\n")
    assert sum(len(list(Corpus.open(str(scripts)).documents(s))) for s in SPLITS) == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no string 'text' (found the keys body)"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8 at byte 13"),
        ("a.jsonl", b'{"text": "x \\ud800"}\n', "line 1 holds half a surrogate pair"),
        ("a.jsonl", b"[" * 200_000 + b"\n", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": null}\n', "found text: NoneType"),
        ("a.jsonl", b"[1]\n", "line 1 has no string 'text' (found list)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20], "damaged or cut short"),
        ("a.jsonl.gz", b"nonsense", "Not a gzipped file"),
        ("a.jsonl.zst", b"nonsense", "damaged or cut short"),
        ("a.parquet", b"nonsense", "can't be read"),
        ("a.arrow", b"nonsense", "can't be read"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_place(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    """One CorpusError each."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=re.escape(message)) as caught:
        Corpus.open(str(tmp_path)).fingerprint()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    """By name, with what is wanted."""
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(CorpusError, match="no file in it that can be read"):
        Corpus.open(str(tmp_path))
