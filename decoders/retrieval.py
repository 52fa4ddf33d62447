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

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from memdec.decoders.datastore import Datastore
from memdec.decoders.errors import PackageError
from memdec.decoders.manifest import fingerprint
from memdec.decoders.package import fingerprint_model, is_lambda, read_json
from memdec.decoders.passages import RagOptions

NAME = "retrieval.json"
FORMAT = 1
KEY = "final hidden state of the base"
INDEX, VALUES = "index.faiss", "values.npy"
HASHED = 16 << 30  # bytes a server reads through at start, a second a gigabyte; of larger files only the size is checked


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
            raise PackageError(f"{path / NAME}: format is {record.get('format')!r}, this version reads {FORMAT}")
        if record.get("key") != KEY:
            raise PackageError(f"{path}: its keys are {record.get('key')!r}, wanted {KEY!r}")
        try:
            knn, files = record["knn"], record["files"]
            found = cls(
                path, str(record["domain"]), int(record["entries"]), int(knn["neighbours"]), float(knn["tau"]), knn["lam"],
                int(knn["probed"]), RagOptions(**record["rag"]), str(record["base"]), files, dict(record["perplexity"]),
            )  # fmt: skip
            if not is_lambda(found.lam) or found.tau <= 0 or found.neighbours < 1 or found.probed < 1 or found.size < 1:
                raise ValueError(f"knn is {knn!r}, wanted lam from 0 to 1, the others above 0")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PackageError(f"{path / NAME}: damaged ({type(error).__name__}: {error})") from None
        return found

    @classmethod
    def open(cls, path: Path, base: Path) -> "RetrievalPackage":
        """Read a folder and check it for a base. Raises PackageError, one line, if it is damaged or another base's."""
        found, own = cls.read(path), fingerprint_model(base)
        if found.base != own:
            raise PackageError(
                f"{path}: made for another base (fingerprint {found.base}; {base} has {own}); make one with memdec retrieval"
            )
        for name, expected in found.files.items():
            check_file(path / name, expected)
        return found

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(f["bytes"]) for f in self.files.values())

    @property
    def revision(self) -> str:
        """Fingerprint of its files."""
        return fingerprint(self.files)


def describe(file: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def check_file(file: Path, expected: dict[str, Any]) -> None:
    """Raise PackageError unless a file is as `describe` found it."""
    if not file.is_file():
        raise PackageError(f"{file}: missing")
    if file.stat().st_size != expected["bytes"]:
        raise PackageError(f"{file}: {file.stat().st_size:,} bytes, wanted {expected['bytes']:,}; truncated or damaged, copy it again")
    if file.stat().st_size <= HASHED and describe(file) != expected:
        raise PackageError(f"{file}: its bytes are not those that were written; damaged, copy it again")
