"""Read a corpus: stream its documents, split into train, valid and test.

A corpus is a folder (or the word ``stdlib``: the running interpreter's own standard library). Its files may be ``.txt``, ``.md``
and ``.py`` (one document each), ``.jsonl`` (plain, ``.gz`` or ``.zst``), ``.parquet`` and ``.arrow`` (a folder that `datasets`
saved); the latter three hold a document in the field ``text`` of every row. When files are named ``train.*``, ``valid.*`` (or
``validation.*``) and ``test.*``, or sit in folders so named, those are the splits, and ready-made ``.txt`` files hold documents
separated by one blank line. Otherwise a document's split is drawn from a hash of its text, so that adding files never moves
the others between splits.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memdec.decoders.reading.documents import KINDS, Document, documents_of, files_in
from memdec.decoders.reading.errors import CorpusError

SPLITS = ("train", "valid", "test")
ALIASES = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
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
        """Resolve a ``--corpus`` value. Raises CorpusError if there is no such folder, or nothing in it that can be read."""
        root = Path(sysconfig.get_path("stdlib")) if source == STDLIB else Path(source)
        wanted = f"a folder of {', '.join(KINDS)} files, or '{STDLIB}'"
        if not root.is_dir():
            raise CorpusError(f"--corpus {source}: no such folder (wanted: {wanted})")
        corpus = cls(STDLIB if source == STDLIB else root.resolve().name, root)
        if not corpus.files():
            raise CorpusError(f"--corpus {source}: no file in it that can be read (wanted: {wanted})")
        return corpus

    def documents(self, split: str) -> Iterator[str]:
        """Yield the texts of one split's documents, in a fixed order, one in memory at a time."""
        return (document.text for document in self.named(split))

    def named(self, split: str) -> Iterator[Document]:
        """Yield the documents of one split with their ids, in the same order."""
        for owner, document in self._all(split):
            if (owner or split_of(document.text)) == split:
                yield document

    def fingerprint(self) -> str:
        """Hash of every document and its split: equal text, equal fingerprint, whatever the files' times."""
        digests = {split: hashlib.sha256() for split in SPLITS}
        for owner, document in self._all(None):
            digests[owner or split_of(document.text)].update(hashlib.sha256(document.text.encode()).digest())
        return hashlib.sha256(b"".join(digests[split].digest() for split in SPLITS)).hexdigest()[:16]

    def files(self) -> list[Path]:
        """The files that hold documents, in a fixed order."""
        skipped = STDLIB_SKIPPED if self.name == STDLIB else set()
        paths = files_in(self.root, (".py",) if self.name == STDLIB else KINDS)
        return [p for p in paths if not skipped.intersection(p.relative_to(self.root).parts)]

    def ready_made(self) -> dict[Path, str]:
        """Map each file to the split that its name or its folder's name gives; {} if no file is of the train split."""
        owners = {}
        for path in self.files():
            # Names of .py and .md files don't count (train.py is a script), but their folders' names do.
            own = (path.name.split(".")[0].split("-")[0],) if path.suffix not in (".py", ".md") else ()
            split = next((ALIASES[n] for n in (*own, *path.relative_to(self.root).parts[:-1]) if n in ALIASES), None)
            if split:
                owners[path] = split
        if self.name == STDLIB or "train" not in owners.values():
            return {}
        missing = [s for s in SPLITS if s not in owners.values()]
        if missing:
            raise CorpusError(f"{self.root}: no {missing[0]} file in it; a corpus with train.* also needs valid.* and test.*")
        return owners

    def _all(self, split: str | None) -> Iterator[tuple[str | None, Document]]:
        """Yield (ready-made split or None, document) of every document; with `split`, files of other ready-made splits aren't opened."""
        owners = self.ready_made()
        for path in list(owners) or self.files():
            owner = owners.get(path)
            if owner and split and owner != split:
                continue
            for document in documents_of(self.root, path, blank_lines=bool(owner) and path.stem in ALIASES):
                yield owner, document


def split_of(text: str) -> str:
    """Return the split a document belongs to, from a hash of its text alone."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 1000
    if bucket < HELD_OUT_PER_MILLE:
        return "test"
    return "valid" if bucket < 2 * HELD_OUT_PER_MILLE else "train"
