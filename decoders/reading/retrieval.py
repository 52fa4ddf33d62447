"""A retrieval folder, for the modes `knn` and `rag`: a tuned kNN-LM datastore of the base's own keys, and BM25 passages of the same text.

    retrieval.json    domain, base, tuned parameters, and every file's size and hash
    index.faiss       keys and index in one file, memory-mapped
    values.npy        the token after each key, [entries]
    passages.npy      the training text in passages, [passages, length]
    bm25/             the BM25 index over the passages

The keys are the base's final normed hidden states, those of `memdec.decoders.datastore`, but of the untuned base: at inference
the base's forward pass gives the query for free. (The datastore that a decoder imitates has the keys of a teacher tuned on the domain, which
would be a second model to run.)

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
NEEDED = (INDEX, VALUES, TOKENS, f"{WORDS}/")  # the files that are read; retrieval.json must list each with its hash


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
    """Validation perplexity of the base and of the kNN-LM."""

    def datastore(self) -> Datastore:
        """Open the datastore memory-mapped: at once, and without memory of its own. `keys` is empty, because the index holds the keys."""
        index = faiss.read_index(str(self.path / INDEX), faiss.IO_FLAG_MMAP_IFC)
        return Datastore(np.zeros((0, index.d), np.float16), np.load(self.path / VALUES, mmap_mode="r"), index)

    @classmethod
    def read(cls, path: Path) -> "RetrievalPackage":
        """Read retrieval.json. Raises PackageError, one line."""
        if not path.is_dir():
            raise PackageError(f"{path}: no such folder")
        if not (path / NAME).is_file():
            raise PackageError(f"{path}: no {NAME} in it; make one with memdec retrieval")
        fields = read_json(path / NAME)
        if fields.get("format") != FORMAT:
            raise PackageError(f"{path / NAME}: format is {shown(fields.get('format'))}, this version reads {FORMAT}")
        if fields.get("key") != KEY:
            raise PackageError(f"{path}: its keys are {shown(fields.get('key'))}, wanted {KEY!r}")
        record = checked(RetrievalRecord, fields, f"{path / NAME}: damaged")
        knn, files = record.knn, {name: file.model_dump() for name, file in record.files.items()}
        if missing := [name for name in NEEDED if not any(f == name or (name[-1] == "/" and f.startswith(name)) for f in files)]:
            raise PackageError(f"{path / NAME}: damaged: files has no {missing[0]}, wanted the size and hash of whatever is read")
        return cls(
            path, record.domain, record.entries, knn.neighbours, knn.tau, knn.lam, knn.probed, RagOptions(**record.rag.model_dump()), record.base,
            files, record.perplexity,
        )  # fmt: skip

    @classmethod
    def open(cls, path: Path, base: Path) -> "RetrievalPackage":
        """Read a folder and check all its files. Raises PackageError, one line, if it is damaged or was made for another base."""
        package, own = cls.read(path), fingerprint_model(base)
        if package.base != own:
            raise PackageError(
                f"{path}: made for another base (fingerprint {package.base}; {base} has {own}); make one with memdec retrieval"
            )
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda name: check_file(path / name, package.files[name]), package.files):
                pass
        return package

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
    """Raise PackageError unless a file has the size and hash that `describe` returned; reads the file to its end."""
    if not file.exists():
        raise PackageError(f"{file}: missing")
    with open_regular(file) as stream:
        size = stream.seek(0, 2)
        if size != expected["bytes"]:
            raise PackageError(f"{file}: {size:,} bytes, wanted {expected['bytes']:,}; truncated or damaged, copy it again")
        stream.seek(0)
        if file_digest(stream) != expected["sha256"]:
            raise PackageError(f"{file}: its bytes are not those that were written; damaged, copy it again")
