"""The retrieval baselines as one folder to serve: a kNN-LM datastore of the base's own keys, tuned, and BM25 passages of the same text.

    retrieval.json    what it is, for which base, and every file's size and hash
    index.faiss       keys and index in one file, memory-mapped
    values.npy        the token after each key, [entries]
    passages.npy      the training text in passages, [passages, length]
    bm25/             the index over their words

The keys are the base's final normed hidden states, those of `memdec.decoders.datastore`, but of the base as it is: at inference
they come with the base's own pass. (The datastore that a decoder imitates has the keys of a teacher tuned on the domain, a whole further model.)

This module reads and checks the folder; `memdec.decoders.retrieval_build` makes it.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from memdec.decoders.reading.datastore import Datastore
from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import json_hash, open_regular, read_json, shown
from memdec.decoders.reading.passages import INDEX as WORDS
from memdec.decoders.reading.passages import TOKENS, RagOptions
from memdec.decoders.reading.record import RetrievalRecord, checked
from memdec.decoders.reading.weights import THREADS, file_digest, fingerprint_model

NAME = "retrieval.json"
FORMAT = 1
KEY = "final hidden state of the base"
INDEX, VALUES = "index.faiss", "values.npy"
NEEDED = (INDEX, VALUES, TOKENS, f"{WORDS}/")  # what is read, and so must be among the files whose hashes are known


@dataclass(frozen=True)
class RetrievalPackage:
    """A retrieval folder, checked."""

    path: Path
    domain: str
    entries: int
    neighbours: int
    """k."""
    tau: float
    lam: float
    """Tuned on the domain's validation text."""
    probed: int
    """Index cells a query visits."""
    rag: RagOptions
    base: str
    """Fingerprint of the base whose keys it holds."""
    files: dict[str, dict[str, Any]]
    """Every file's size and hash."""
    perplexity: dict[str, float]
    """Of the base and of the kNN-LM on the validation text."""

    def datastore(self) -> Datastore:
        """The datastore, memory-mapped: it costs no memory of its own and is there at once. Its keys are in the index alone."""
        index = faiss.read_index(str(self.path / INDEX), faiss.IO_FLAG_MMAP_IFC)
        return Datastore(np.zeros((0, index.d), np.float16), np.load(self.path / VALUES, mmap_mode="r"), index)

    @classmethod
    def read(cls, path: Path) -> "RetrievalPackage":
        """Read retrieval.json. Raises PackageError, one line."""
        if not path.is_dir():
            raise PackageError(f"{path}: no such folder")
        if not (path / NAME).is_file():
            raise PackageError(f"{path}: no {NAME} in it; make one with memdec retrieval")
        record = read_json(path / NAME)
        if record.get("format") != FORMAT:
            raise PackageError(f"{path / NAME}: format is {shown(record.get('format'))}, this version reads {FORMAT}")
        if record.get("key") != KEY:
            raise PackageError(f"{path}: its keys are {shown(record.get('key'))}, wanted {KEY!r}")
        told = checked(RetrievalRecord, record, f"{path / NAME}: damaged")
        knn, files = told.knn, {name: file.model_dump() for name, file in told.files.items()}
        if missing := [name for name in NEEDED if not any(f == name or (name[-1] == "/" and f.startswith(name)) for f in files)]:
            raise PackageError(f"{path / NAME}: damaged: files has no {missing[0]}, wanted the size and hash of whatever is read")
        return cls(
            path, told.domain, told.entries, knn.neighbours, knn.tau, knn.lam, knn.probed, RagOptions(**told.rag.model_dump()), told.base,
            files, told.perplexity,
        )  # fmt: skip

    @classmethod
    def open(cls, path: Path, base: Path) -> "RetrievalPackage":
        """Read a folder and check it for a base. Raises PackageError, one line, if it is damaged or another base's."""
        found, own = cls.read(path), fingerprint_model(base)
        if found.base != own:
            raise PackageError(
                f"{path}: made for another base (fingerprint {found.base}; {base} has {own}); make one with memdec retrieval"
            )
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda name: check_file(path / name, found.files[name]), found.files):
                pass
        return found

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(f["bytes"]) for f in self.files.values())

    @property
    def revision(self) -> str:
        """Fingerprint of its files."""
        return json_hash(self.files)


def describe(file: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with open_regular(file) as stream:
        digest = file_digest(stream)
        return {"bytes": stream.tell(), "sha256": digest}


def check_file(file: Path, expected: dict[str, Any]) -> None:
    """Raise PackageError unless a file is as `describe` found it: all its bytes are read, however large it is."""
    if not file.exists():
        raise PackageError(f"{file}: missing")
    with open_regular(file) as stream:
        size = stream.seek(0, 2)
        if size != expected["bytes"]:
            raise PackageError(f"{file}: {size:,} bytes, wanted {expected['bytes']:,}; truncated or damaged, copy it again")
        stream.seek(0)
        if file_digest(stream) != expected["sha256"]:
            raise PackageError(f"{file}: its bytes are not those that were written; damaged, copy it again")
