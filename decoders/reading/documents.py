"""Read the documents of text files: `.txt`, `.md`, `.py` (one document each), `.jsonl` (plain, `.gz` or `.zst`), `.parquet` and `.arrow`.

A document's id is its file's path within its folder; where a file holds several, `#` and the document's number, from 1, follow.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from memdec.decoders.reading.errors import CorpusError
from memdec.decoders.reading.files import is_utf8

TEXT = (".txt", ".md", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TABLES = (".parquet", ".arrow")
KINDS = (*TEXT, *LINES, *TABLES)
FIELD = "text"


@dataclass(frozen=True)
class Document:
    """A document and its id."""

    name: str
    text: str


def files_in(root: Path, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """The files of a folder, at any depth, that hold documents, in a fixed order."""
    return [p for p in sorted(root.rglob("*")) if p.name.lower().endswith(kinds) and p.is_file()]


def documents_of(root: Path, path: Path, blank_lines: bool = False) -> Iterator[Document]:
    """Yield the documents of one file of `root` that hold more than white space, with their ids; see `read_documents`."""
    name = str(path.relative_to(root))
    several = blank_lines or not path.name.lower().endswith(TEXT)
    for number, text in enumerate(read_documents(path, blank_lines), 1):
        if text.strip():
            yield Document(f"{name}#{number}" if several else name, text)


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
        if not is_utf8(text):
            raise CorpusError(f"{path}: line {number} holds half a surrogate pair, which no UTF-8 text can; mend it first")
        yield text


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
