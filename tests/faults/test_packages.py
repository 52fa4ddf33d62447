"""Whatever somebody writes into a folder that decoders may be loaded from: one line that says what is wrong, at once."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import open_regular
from memdec.decoders.reading.names import RECORD as NAME
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.retrieval import INDEX, KEY, VALUES, RetrievalPackage, describe
from memdec.decoders.reading.retrieval import NAME as RETRIEVAL
from memdec.decoders.reading.weights import MOST_HEADER, fingerprint_model, read_tensors, scan

CONFIG = {"architectures": ["Toy"], "vocab_size": 4, "hidden_size": 2}
FIGURES = {"name": "base", "lambda": 0.5, "base": 9.0, "mixture": 8.0, "tokens": 100}
RECORD = {"format": 1, "domain": "toy", "lambda": 0.6, "bases": {"0" * 32: FIGURES}, "training": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package, small, but with everything that is read of one."""
    made = tmp_path / "package"
    made.mkdir()
    write(made, "config.json", CONFIG)
    write(made, NAME, RECORD)
    save_file({"a": np.ones((4, 2), np.float32), "b": np.zeros(3, np.float16)}, made / "model.safetensors")
    return made


def write(folder: Path, name: str, value: Any) -> None:
    """A JSON file, or a text as it is."""
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def refusal(path: Path) -> str:
    """What a package is refused with: one line, of bearable length, that can be sent, and soon."""
    began = time.monotonic()
    with pytest.raises(PackageError) as caught:
        Package.open(path)
    message = str(caught.value)
    message.encode()
    assert "\n" not in message and len(message) < 700 and time.monotonic() - began < 20
    return message


NAN, DEEP = float("nan"), '{"a":' * 100_000 + "1" + "}" * 100_000
MALFORMED: dict[str, tuple[str, Any, str]] = {
    "deep config": ("config.json", DEEP, "config.json: more than 32 lists and objects within each other"),
    "less deep config": ("config.json", '{"a":' * 40 + "1" + "}" * 40, "config.json: more than 32 lists and objects"),
    "a list for an object": ("config.json", [], "config.json: wanted a JSON object, found list"),
    "no end": ("config.json", "[" + "1," * 600_000, "config.json: more than 1,048,576 bytes"),
    "two architectures": ("config.json", {"architectures": ["A", "B"]}, "architectures is ['A', 'B'], wanted a list with one name"),
    "an architecture of another type": ("config.json", {"architectures": [5]}, "architectures is [5], wanted a list with one name"),
    "no architecture": ("config.json", {}, "config.json: architectures is missing"),
    "a text for a number": ("config.json", {**CONFIG, "hidden_size": "64"}, "config.json: hidden_size is '64', wanted a whole number from 1"),
    "a huge number": ("config.json", {**CONFIG, "vocab_size": 10**300}, "vocab_size is 1000"),
    "NaN measured": (NAME, {**RECORD, "bases": {"0" * 32: {**FIGURES, "mixture": NAN}}}, "mixture is nan, wanted a finite number above 0"),
    "NaN as lambda": (NAME, {**RECORD, "lambda": NAN}, "lambda is nan, wanted a number from 0 to 1"),
    "half a surrogate": (NAME, {**RECORD, "bases": {"0" * 32: {**FIGURES, "name": "\ud800"}}}, r"the text '\ud800' is not UTF-8"),
    "half a surrogate as key": (NAME, {**RECORD, "training": {"\udfff": 1}}, "is not UTF-8"),
    "a list of bases": (NAME, {**RECORD, "bases": [1]}, "bases is [1], wanted an object of objects"),
    "a base that is none": (NAME, {**RECORD, "bases": {"0" * 32: 5}}, "is 5, wanted an object"),
    "a figure that is a text": (NAME, {**RECORD, "bases": {"0" * 32: {**FIGURES, "tokens": "9"}}}, "tokens is '9', wanted a whole number"),
    "true as lambda": (NAME, {**RECORD, "lambda": True}, "lambda is True, wanted a number from 0 to 1"),
    "a key that is none": (NAME, {**RECORD, "lamda": 0.5}, "lamda is no key of this file; wanted format, domain, lambda"),
    "another format": (NAME, {**RECORD, "format": "1"}, "format is '1', this version reads 1"),
    "a domain of objects": (NAME, {**RECORD, "domain": {}}, "domain is {}, wanted a text"),
    "an index of lists": ("model.safetensors.index.json", {"weight_map": [1]}, "weight_map is [1], wanted an object"),
    "an index of numbers": ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "weight_map.a is 1, wanted a file name"),
    "an index of others": ("model.safetensors.index.json", {"weight_map": {"a": "x"}}, "'x' is missing"),
    "weights that are text": ("model.safetensors", "nothing here", "not a safetensors file"),
    "weights that are nothing": ("model.safetensors", "", "not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(folder: Path, name: str) -> None:
    """One line that names the file, the key, the value and what is wanted."""
    file, value, expected = MALFORMED[name]
    write(folder, file, value)
    message = refusal(folder)
    assert expected in message and file in message, message


HEADERS: dict[str, tuple[Any, str]] = {
    "a list": ([], "damaged"),
    "an entry that is none": ({"a": 1}, "header: a is 1, wanted an object"),
    "no type": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "dtype is None"),
    "a shape of texts": ({"a": {"dtype": "F32", "shape": ["8"], "data_offsets": [0, 32]}}, "shape is ['8'], wanted a list of whole numbers"),
    "a negative shape": ({"a": {"dtype": "F32", "shape": [-8], "data_offsets": [0, 32]}}, "shape is [-8]"),
    "offsets backwards": ({"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 0]}}, "data_offsets is [32, 0]"),
    "offsets elsewhere": ({"a": {"dtype": "F32", "shape": [8], "data_offsets": [8, 40]}}, "begins at byte 8, wanted 0"),
    "more than it has": ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "its header says"),
    "another size": ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 32]}}, "takes 12"),
    "whole numbers as weights": ({"a": {"dtype": "I32", "shape": [8], "data_offsets": [0, 32]}}, "weight a has type 'I32', wanted one of"),
    "a product without end": ({"a": {"dtype": "F32", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 32]}}, "takes"),
    "two in one place": ({n: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for n in "ab"}, "begins at byte 0, wanted 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_malformed_headers(folder: Path, name: str) -> None:
    """Of a file of 32 bytes of data."""
    header, expected = HEADERS[name]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(32))
    assert expected in refusal(folder)


def test_a_header_of_100_megabytes(folder: Path) -> None:
    """Refused by its length, before it is read: parsing it would hold up all other threads for seconds."""
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write((100 << 20).to_bytes(8, "little") + b"{")
        stream.truncate(101 << 20)
    assert f"its header has 104,857,600 bytes, wanted 2 to {MOST_HEADER:,}" in refusal(folder)


def kinds(path: Path) -> dict[str, Callable[[], None]]:
    """Ways to put something into the place of a file that is none."""
    return {
        "a folder": path.mkdir,
        "a named pipe": lambda: os.mkfifo(path),
        "No such file": lambda: path.symlink_to(path.parent / "nowhere"),
        "Too many levels": lambda: path.symlink_to(path),
        "a device": lambda: path.symlink_to("/dev/zero"),
    }


@pytest.mark.parametrize("file", ["config.json", NAME, "model.safetensors", "other.safetensors", "model.safetensors.index.json"])
def test_no_regular_file(folder: Path, file: str) -> None:
    """A folder, a pipe without another end, a link to nowhere, to itself, to a device: refused by name at once."""
    for kind in kinds(folder / file):
        (folder / file).unlink(missing_ok=True)
        kinds(folder / file)[kind]()
        assert kind in (message := refusal(folder)) and file in message
        shutil.rmtree(folder / file) if kind == "a folder" else (folder / file).unlink()


def test_links_to_outside_are_seen_where_the_file_is_opened(folder: Path, tmp_path: Path) -> None:
    """Not only beforehand: it may have been swapped since."""
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(PackageError, match="link to outside"):
        open_regular(folder / "config.json", (folder,))
    with open_regular(folder / "config.json", (tmp_path.resolve(),)) as stream:
        assert stream.read() == b"{}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [*CONFIG, *RECORD, *FIGURES, "num_hidden_layers", "weight_map", "token_map", "dtype", "shape", "data_offsets", "__metadata__", "a"]
)


def mutated(value: Any, key: str, new: Any, depth: int) -> Any:
    """A value with another at some place in it."""
    if isinstance(value, dict) and depth and value:
        first = list(value)[len(key) % len(value)]
        return {**value, first: mutated(value[first], key, new, depth - 1)}
    return {**value, key: new} if isinstance(value, dict) else new


def test_fuzzed_packages() -> None:
    """Whatever the JSON of config, record, index and header says: read, or refused in one line; and what was read can be sent."""
    header = {"a": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}}
    originals: dict[str, Any] = {
        "config.json": CONFIG,
        NAME: RECORD,
        "model.safetensors.index.json": {"weight_map": {"a": "model.safetensors"}},
        "": header,
    }

    told: list[tuple[str, str]] = []

    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(originals)), KEYS, JSON, st.integers(0, 3))
    def one(file: str, key: str, new: Any, depth: int) -> None:
        with tempfile.TemporaryDirectory() as made:
            for name, value in originals.items():
                text = json.dumps(mutated(value, key, new, depth) if name == file else value)
                if name:
                    write(Path(made), name, text)
                else:
                    data = text.encode()
                    (Path(made) / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(32))
            try:
                found = Package.read(Path(made)).beside(lambda: "0" * 32)
                json.dumps([found.lam, found.perplexity, found.revision], allow_nan=False, ensure_ascii=False).encode()
            except PackageError as error:
                told.append((made, str(error)))

    one()
    assert len(told) > 50
    for made, message in told:
        message.encode()
        assert "\n" not in message and len(message) < 700 and message.startswith(made)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_fuzzed_bytes(data: bytes) -> None:
    """Bytes of no kind, in the place of each file."""
    for name in ("config.json", NAME, "model.safetensors"):
        with tempfile.TemporaryDirectory() as made:
            write(Path(made), "config.json", CONFIG)
            save_file({"a": np.ones(2, np.float32)}, Path(made) / "model.safetensors")
            (Path(made) / name).write_bytes(data)
            refusal(Path(made))


def test_a_file_swapped_after_the_check(folder: Path) -> None:
    """The worker reads what was checked or nothing: a swap and a swap back are seen too, since what is hashed is what is loaded."""
    checked = scan(folder).digests
    assert [t.name for t, _ in read_tensors(folder, checked)] == ["a", "b"]
    save_file({"a": -np.ones((4, 2), np.float32), "b": np.zeros(3, np.float16)}, folder / "model.safetensors")
    with pytest.raises(PackageError, match="changed since it was checked"):
        list(read_tensors(folder, checked))
    save_file({n: np.ones((1000, 100), np.float32) for n in "ab"}, folder / "model.safetensors")
    reading = read_tensors(folder, scan(folder).digests)
    next(reading)
    os.truncate(folder / "model.safetensors", 500_000)  # a map of it would end the process here
    with pytest.raises(PackageError, match=r"ended while it was read|changed since|its header says"):
        list(reading)


def retrieval_folder(root: Path, base: Path) -> Path:
    """A retrieval folder with bytes of no meaning: what is checked before any of it is read."""
    made = root / "retrieval"
    (made / "bm25").mkdir(parents=True)
    names = [INDEX, VALUES, "passages.npy", "bm25/data.npy"]
    for i, name in enumerate(names):
        (made / name).write_bytes(bytes([i]) * 1000)
    record = {
        "format": 1, "domain": "toy", "base": fingerprint_model(base), "key": KEY, "entries": 5, "corpus": "x", "perplexity": {"base": 2.0},
        "knn": {"neighbours": 2, "tau": 1.5, "lam": 0.5, "probed": 1}, "rag": {"passage": 8}, "files": {n: describe(made / n) for n in names},
    }  # fmt: skip
    write(made, RETRIEVAL, record)
    return made


def test_retrieval_folders_with_wrong_hashes(folder: Path, tmp_path: Path) -> None:
    """Each file's bytes, each record's claim; names that lead elsewhere; hashes left out."""
    made = retrieval_folder(tmp_path, folder)
    record = json.loads((made / RETRIEVAL).read_text())
    assert RetrievalPackage.open(made, folder).size == 4000
    for name in record["files"]:
        good = (made / name).read_bytes()
        (made / name).write_bytes(good[:500] + b"!" + good[501:])
        with pytest.raises(PackageError, match=f"{name}: its bytes are not those that were written"):
            RetrievalPackage.open(made, folder)
        (made / name).write_bytes(good)
        few = {n: f for n, f in record["files"].items() if n != name}
        claims: list[tuple[Any, str]] = [
            ({**record["files"], name: {"bytes": 1000, "sha256": "0" * 64}}, "its bytes are not"), (few, "wanted the size and hash"),
            ({**record["files"], name: {"bytes": "1000", "sha256": "0" * 64}}, "wanted a number of bytes"),
            ({**record["files"], name: [1]}, "wanted an object"), ({**few, "../x": record["files"][name]}, "name of a file in the folder"),
            ({**few, f"/{name}": record["files"][name]}, "name of a file in the folder"), ([name], "wanted an object"),
        ]  # fmt: skip
        for files, expected in claims:
            write(made, RETRIEVAL, {**record, "files": files})
            with pytest.raises(PackageError, match=expected):
                RetrievalPackage.open(made, folder)
        write(made, RETRIEVAL, record)
    (made / INDEX).unlink()
    os.mkfifo(made / INDEX)
    with pytest.raises(PackageError, match="named pipe"):
        RetrievalPackage.open(made, folder)
