"""Stage 1: documents and their splits.

A corpus is a folder of UTF-8 text, or the word ``stdlib`` for the running interpreter's own standard library.
Files named ``train.txt``, ``valid.txt`` and ``test.txt`` are taken as ready-made splits, documents separated by one
blank line; any other ``.txt``, ``.md`` or ``.py`` file is one document, and its split is drawn from a hash of its
text, so that adding files never moves the others between splits.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from decoders.errors import CorpusError

SPLITS = ("train", "valid", "test")
SUFFIXES = (".txt", ".md", ".py")
STDLIB = "stdlib"
HELD_OUT_PER_MILLE = 20  # of the documents, for valid and again for test
# Tests and vendored code repeat each other and teach little; generated tables are not text.
STDLIB_SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data", "encodings", "_vendor"}


@dataclass(frozen=True)
class Corpus:
    """A named source of documents. ``root`` is the folder the text comes from."""

    name: str
    root: Path

    @classmethod
    def open(cls, source: str) -> "Corpus":
        """Resolve a ``--corpus`` value. Raises CorpusError if there is no such folder."""
        root = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
        if not root.is_dir():
            raise CorpusError(f"--corpus {source}: no such folder (wanted: a folder of {', '.join(SUFFIXES)} files, or 'stdlib')")
        return cls(STDLIB if source == STDLIB else root.name, root)

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of one split, in a fixed order."""
        if (self.root / "train.txt").is_file():
            yield from self._ready_made(split)
            return
        for path in self._files():
            text = read_utf8(path)
            if text.strip() and split_of(text) == split:
                yield text

    def _ready_made(self, split: str) -> Iterator[str]:
        path = self.root / f"{split}.txt"
        if not path.is_file():
            raise CorpusError(f"{path}: missing; a corpus with train.txt also needs valid.txt and test.txt")
        for document in read_utf8(path).split("\n\n"):
            if document.strip():
                yield document.strip("\n") + "\n"

    def _files(self) -> list[Path]:
        skipped = STDLIB_SKIPPED if self.name == STDLIB else set()
        suffixes = (".py",) if self.name == STDLIB else SUFFIXES
        found = [p for p in sorted(self.root.rglob("*")) if p.suffix in suffixes and p.is_file()]
        return [p for p in found if not skipped.intersection(p.relative_to(self.root).parts)]

    def fingerprint(self) -> str:
        """Hash of every document of every split: equal text, equal fingerprint, whatever the files' times."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for document in self.documents(split):
                digest.update(hashlib.sha256(document.encode()).digest())
            digest.update(split.encode())
        return digest.hexdigest()[:16]


def split_of(text: str) -> str:
    """Return the split a document belongs to, from a hash of its text alone."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 1000
    if bucket < HELD_OUT_PER_MILLE:
        return "test"
    return "valid" if bucket < 2 * HELD_OUT_PER_MILLE else "train"


def read_utf8(path: Path) -> str:
    """Read a text file. Raises CorpusError naming the file and the first bad byte if it isn't UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); convert it first") from None
    except OSError as error:
        raise CorpusError(f"{path}: {error.strerror}") from None
