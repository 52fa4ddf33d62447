"""Check safetensors files: their headers, and in one pass over all bytes their hashes and that every value is finite.

Nothing is memory-mapped: a file that is truncated meanwhile gives a short read, where a map would kill the process (SIGBUS).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import MOST_JSON, open_regular, parse_json, read_bytes, read_json, reason, shown

CONFIG, INDEX, PATTERN = "config.json", "model.safetensors.index.json", "*.safetensors"
MOST_HEADER = 8 << 20  # bytes, at about 120 per tensor; parsing more would hold the GIL too long
MOST_FILES = 1000
PIECE = 16 << 20  # bytes read at once
HASH_LENGTH = 32  # hexadecimal digits, 128 bits: a deliberate collision would take 2**64 tries
THREADS = 4  # files hashed at the same time; more would only wait for the disk
NOT_FINITE = {"F64": (np.uint64, 0x7FF0 << 48), "F32": (np.uint32, 0x7F80_0000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry in a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Offset of its first byte, counted from the end of the header."""
    end: int


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files. Raises PackageError if there is none, or more than MOST_FILES."""
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise PackageError(f"{folder}: no .safetensors file in it (only safetensors are loaded)")
    if len(files) > MOST_FILES:
        raise PackageError(f"{folder}: {len(files):,} .safetensors files, wanted at most {MOST_FILES:,}")
    return files


def check_weights(folder: Path, within: Sequence[Path] = (), most: int | None = None) -> None:
    """Raise PackageError if safetensors files are missing, have another length than their headers say, or have more than `most` bytes in all."""
    files = weight_files(folder)
    if os.path.lexists(folder / INDEX):
        missing = sorted(indexed(folder / INDEX, within) - {f.name for f in files})
        if missing:
            raise PackageError(f"{folder}: {shown(missing[0])} is missing, named in {INDEX}")
    size = 0
    for file in files:
        with open_regular(file, within) as stream:
            read_header(stream, file)
            size += stream.seek(0, 2)
    if most is not None and size > most:
        raise PackageError(f"{folder}: {size:,} bytes of weights, wanted at most {most:,}")


def indexed(index: Path, within: Sequence[Path] = ()) -> set[str]:
    """The files that a checkpoint's index names. Raises PackageError."""
    weight_map = read_json(index, within, MOST_HEADER).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise PackageError(f"{index}: weight_map is {shown(weight_map)}, wanted an object of weight names and file names")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise PackageError(f"{index}: weight_map.{name} is {shown(file)}, wanted a file name")
    return set(weight_map.values())


def safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header as an object. Raises PackageError."""
    with open_regular(file) as stream:
        return _raw_header(stream, file)


def _raw_header(stream: BufferedReader, file: Path) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= MOST_HEADER:
        raise PackageError(f"{file}: its header has {length:,} bytes, wanted 2 to {MOST_HEADER:,}; damaged or not a safetensors file")
    data = stream.read(length)
    if len(data) < length or not data.startswith(b"{"):
        raise PackageError(f"{file}: its header is damaged; truncated or not a safetensors file")
    return 8 + length, parse_json(data, f"{file}: header")


def read_header(stream: BufferedReader, file: Path) -> tuple[int, list[Tensor]]:
    """Where the data begins, and the tensors in the order of their bytes, which leave no gap. Raises PackageError."""
    start, header = _raw_header(stream, file)
    header.pop("__metadata__", None)
    tensors = sorted((_tensor(f"{file}: header: {name}", name, entry) for name, entry in header.items()), key=lambda t: (t.begin, t.end))
    place = 0
    for tensor in tensors:
        if tensor.begin != place:
            raise PackageError(
                f"{file}: header: {tensor.name}: begins at byte {tensor.begin:,}, wanted {place:,}, where the one before ends"
            )
        place = tensor.end
    expected, actual = start + place, stream.seek(0, 2)
    if expected != actual:
        raise PackageError(f"{file}: {actual:,} bytes, its header says {expected:,}; truncated or damaged, copy it again")
    stream.seek(start)
    return start, tensors


def _tensor(where: str, name: str, entry: Any) -> Tensor:
    """An entry of a header. Raises PackageError that names the key and what is wanted."""
    if not isinstance(entry, dict):
        raise PackageError(f"{where} is {shown(entry)}, wanted an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise PackageError(f"{where}: dtype is {shown(dtype)}, wanted the name of a type")
    if not _whole_numbers(shape):
        raise PackageError(f"{where}: shape is {shown(shape)}, wanted a list of whole numbers from 0")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise PackageError(f"{where}: data_offsets is {shown(offsets)}, wanted where it begins and ends")
    size = math.prod(shape) * SIZES[dtype] if dtype in SIZES else None
    if size is not None and size != offsets[1] - offsets[0]:
        raise PackageError(f"{where}: data_offsets is {shown(offsets)}, {offsets[1] - offsets[0]:,} bytes; {dtype} {shape} takes {size:,}")
    return Tensor(name, dtype, tuple(shape), *offsets)


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value)


def pieces(stream: BufferedReader, tensor: Tensor, file: Path) -> Iterator[bytes]:
    """A tensor's bytes from a stream that stands at its beginning, PIECE at a time. Raises PackageError if the file ends before."""
    left = tensor.end - tensor.begin
    while left:
        try:
            data = stream.read(min(left, PIECE))
        except OSError as error:
            raise PackageError(f"{file}: {reason(error)}") from None
        if not data or (len(data) < left and len(data) < PIECE):
            raise PackageError(f"{file}: ended while it was read; it is being written, or was cut short")
        left -= len(data)
        yield data


@dataclass(frozen=True)
class Scanned:
    """Hashes and size of a folder's weights."""

    digests: dict[str, str]
    """File name -> SHA-256 of all its bytes, as `sha256sum` prints it."""
    size: int
    """Bytes of the files."""


def scan(folder: Path, within: Sequence[Path] = (), quantised: bool = False) -> Scanned:
    """Read all weights once: their hashes, and that each value is finite.

    Raises PackageError if a file is damaged, or a weight holds NaN or infinity, or is of a type that isn't floating point and not `quantised`.
    """
    digests, size = {}, 0
    # One thread hashes a piece while another looks for values that aren't finite.
    with ThreadPoolExecutor(1) as pool:
        for file in weight_files(folder):
            with open_regular(file, within) as stream:
                before = _identity(stream)
                digests[file.name], read = _scan_file(stream, file, quantised, pool)
                if _identity(stream) == before:
                    _known[before] = digests[file.name]
            size += read
    return Scanned(digests, size)


def _scan_file(stream: BufferedReader, file: Path, quantised: bool, pool: ThreadPoolExecutor) -> tuple[str, int]:
    start, tensors = read_header(stream, file)
    stream.seek(0)
    digest, read = hashlib.sha256(stream.read(start)), start
    for tensor in tensors:
        for data in pieces(stream, tensor, file):
            hashed = pool.submit(digest.update, data)
            _require_finite(data, tensor, file, quantised)
            hashed.result()
            read += len(data)
    return digest.hexdigest(), read


def _require_finite(data: bytes, tensor: Tensor, file: Path, quantised: bool) -> None:
    if tensor.dtype not in NOT_FINITE:
        if quantised:
            return
        raise PackageError(f"{file}: weight {tensor.name} has type {shown(tensor.dtype)}, wanted one of {', '.join(NOT_FINITE)}")
    kind, exponent = NOT_FINITE[tensor.dtype]
    bits: NDArray[Any] = np.frombuffer(data, kind)
    if np.any((bits & kind(exponent)) == kind(exponent)):
        raise PackageError(f"{file}: weight {tensor.name} holds NaN or infinity")


def read_tensors(folder: Path, digests: dict[str, str]) -> Iterator[tuple[Tensor, bytearray]]:
    """Yield every tensor with its bytes, from the files whose SHA-256 `scan` returned.

    Raises PackageError at the end of the first file whose hash has changed; the caller must then discard all tensors it was given.
    """
    for name, expected in digests.items():
        with open_regular(folder / name) as stream:
            start, tensors = read_header(stream, folder / name)
            stream.seek(0)
            digest = hashlib.sha256(stream.read(start))
            for tensor in tensors:
                data = bytearray()
                for piece in pieces(stream, tensor, folder / name):
                    digest.update(piece)
                    data += piece
                yield tensor, data
        if digest.hexdigest() != expected:
            raise PackageError(f"{folder / name}: changed since it was checked; write files elsewhere, then rename the folder")


def revision_of(config: bytes, weights: dict[str, str]) -> str:
    """A model's revision: a hash of its config.json and of all bytes of its weights (file name -> SHA-256)."""
    digests = {CONFIG: hashlib.sha256(config).hexdigest(), **weights}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]


_known: dict[tuple[int, ...], str] = {}
"""Cache of file hashes, by `_identity`: one server start, or one build, needs the same hash several times."""


def fingerprint_model(folder: Path) -> str:
    """The revision of a model folder; reads every byte of its weights, THREADS files at a time: about a second per gigabyte and core.

    Only for trusted folders: a file's hash is cached until its inode, size or times change.
    """
    config = read_bytes(folder / CONFIG, MOST_JSON) if os.path.lexists(folder / CONFIG) else b""
    files = sorted(folder.glob(PATTERN))
    with ThreadPoolExecutor(THREADS) as pool:
        return revision_of(config, dict(zip((f.name for f in files), pool.map(_digest, files), strict=True)))


def _digest(file: Path) -> str:
    with open_regular(file) as stream:
        key = _identity(stream)
        if key not in _known:
            _known[key] = file_digest(stream)
        return _known[key]


def _identity(stream: BufferedReader) -> tuple[int, ...]:
    """Device, inode, size and times of an open file: some of them change whenever its bytes do."""
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def file_digest(stream: BufferedReader) -> str:
    """SHA-256 of a stream's bytes; the fastest collision-resistant hash on processors with SHA instructions."""
    return hashlib.file_digest(stream, "sha256").hexdigest()
