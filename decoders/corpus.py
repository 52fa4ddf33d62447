"""Read a corpus: stream its documents, split into train, valid and test.

A corpus is a folder (or the word ``stdlib``: the running interpreter's own standard library). Its files may be ``.txt``, ``.md``
and ``.py`` (one document each), ``.jsonl`` (plain, ``.gz`` or ``.zst``), ``.parquet`` and ``.arrow`` (a folder that `datasets`
saved); the latter three hold a document in the field ``text`` of every row. When files are named ``train.*``, ``valid.*`` (or
``validation.*``) and ``test.*``, or sit in folders so named, those are the splits, and ready-made ``.txt`` files hold documents
separated by one blank line. Otherwise a document's split is drawn from a hash of its text, so that adding files never moves
the others between splits.
"""

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from memdec.decoders.reading.errors import CorpusError

SPLITS = ("train", "valid", "test")
ALIASES = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
TEXT = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLES = (".parquet", ".arrow")
FIELD = "text"
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
        wanted = f"a folder of {', '.join((*TEXT, *LINES, *TABLES))} files, or '{STDLIB}'"
        if not root.is_dir():
            raise CorpusError(f"--corpus {source}: no such folder (wanted: {wanted})")
        corpus = cls(STDLIB if source == STDLIB else root.resolve().name, root)
        if not corpus.files():
            raise CorpusError(f"--corpus {source}: no file in it that can be read (wanted: {wanted})")
        return corpus

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of one split, in a fixed order, one in memory at a time."""
        for owner, text in self._all(split):
            if (owner or split_of(text)) == split:
                yield text

    def fingerprint(self) -> str:
        """Hash of every document and its split: equal text, equal fingerprint, whatever the files' times."""
        digests = {split: hashlib.sha256() for split in SPLITS}
        for owner, text in self._all(None):
            digests[owner or split_of(text)].update(hashlib.sha256(text.encode()).digest())
        return hashlib.sha256(b"".join(digests[split].digest() for split in SPLITS)).hexdigest()[:16]

    def files(self) -> list[Path]:
        """The files that hold documents, in a fixed order."""
        skipped = STDLIB_SKIPPED if self.name == STDLIB else set()
        kinds = (".py",) if self.name == STDLIB else (*TEXT, *LINES, *TABLES)
        paths = [p for p in sorted(self.root.rglob("*")) if p.name.lower().endswith(kinds) and p.is_file()]
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

    def _all(self, split: str | None) -> Iterator[tuple[str | None, str]]:
        """Yield (ready-made split or None, text) of every document; with `split`, files of other ready-made splits aren't opened."""
        owners = self.ready_made()
        for path in list(owners) or self.files():
            owner = owners.get(path)
            if owner and split and owner != split:
                continue
            for text in read_documents(path, blank_lines=bool(owner) and path.stem in ALIASES):
                if text.strip():
                    yield owner, text


def split_of(text: str) -> str:
    """Return the split a document belongs to, from a hash of its text alone."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 1000
    if bucket < HELD_OUT_PER_MILLE:
        return "test"
    return "valid" if bucket < 2 * HELD_OUT_PER_MILLE else "train"


def read_documents(path: Path, blank_lines: bool = False) -> Iterator[str]:
    """Yield the documents of one file. `blank_lines`: a text file holds several documents, separated by blank lines.

    Raises CorpusError naming the file and the byte, line or row that can't be read.
    """
    try:
        if path.name.lower().endswith(TABLES):
            yield from _rows(path)
        elif path.name.lower().endswith(LINES):
            yield from _objects(path)
        elif blank_lines:
            yield from _paragraphs(path)
        else:
            yield "".join(_lines(path))
    except OSError as error:  # gzip's own kinds too
        raise CorpusError(f"{path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: damaged or cut short ({error})") from None


def _lines(path: Path) -> Iterator[str]:
    """Yield decoded lines with their line ends. Raises CorpusError naming the first byte that isn't UTF-8."""
    before = 0
    with _bytes(path) as stream:
        for line in stream:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                at, byte = before + error.start, error.object[error.start]
                raise CorpusError(f"{path}: not UTF-8 at byte {at} (0x{byte:02x}); convert it first") from None
            before += len(line)


@contextmanager
def _bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading its decompressed bytes."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as stream:
            yield stream  # type: ignore[misc]
    elif path.suffix.lower() == ".zst":
        import io

        import zstandard

        try:
            with path.open("rb") as raw, io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)) as stream:
                yield stream
        except zstandard.ZstdError as error:
            raise CorpusError(f"{path}: damaged or cut short ({error})") from None
    else:
        with path.open("rb") as stream:
            yield stream


def _paragraphs(path: Path) -> Iterator[str]:
    """Yield the documents of a text file, which are separated by blank lines."""
    lines: list[str] = []
    for line in _lines(path):
        if line.strip("\r\n"):
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n") + "\n"


def _objects(path: Path) -> Iterator[str]:
    """Yield the text field of every line of a JSON Lines file."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.lstrip("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path}: line {number} is not JSON ({error})") from None
        text = row.get(FIELD) if isinstance(row, dict) else None
        if not isinstance(text, str):
            content = type(row).__name__ if not isinstance(row, dict) else f"the keys {', '.join(sorted(row))[:80]}"
            content = f"{FIELD}: {type(text).__name__}" if isinstance(row, dict) and FIELD in row else content
            raise CorpusError(f"{path}: line {number} has no string {FIELD!r} (found {content})")
        if not is_unicode(text):
            raise CorpusError(f"{path}: line {number} holds half a surrogate pair, which no UTF-8 text can; mend it first")
        yield text


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; lone surrogates, which JSON allows, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(path: Path) -> Iterator[str]:
    """Yield the text column of a parquet file, or of an arrow file as `datasets` saves it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix.lower() == ".parquet":
            with pq.ParquetFile(path) as table:
                _check_column(path, table.schema_arrow)
                for batch in table.iter_batches(batch_size=256, columns=[FIELD]):
                    yield from (text or "" for text in batch.column(0).to_pylist())
        else:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as table:
                _check_column(path, table.schema)
                for batch in table:
                    yield from (text or "" for text in batch.column(FIELD).to_pylist())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: can't be read ({str(error).splitlines()[0]})") from None


def _check_column(path: Path, schema: Any) -> None:
    """Raise CorpusError unless the table has a text column of strings."""
    import pyarrow as pa

    kind = schema.field(FIELD).type if FIELD in schema.names else None
    if kind not in (pa.string(), pa.large_string()):
        raise CorpusError(f"{path}: no string column {FIELD!r} (found {', '.join(schema.names)[:80]})")
