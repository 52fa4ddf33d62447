"""Arrays on disk that are filled piece by piece."""

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from memdec.decoders.reading.errors import ManifestError


def fill_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Any:
    """Open a .npy file of `dtype` and `shape` as a writable memory map; create it if it is missing, keep its contents if it exists.

    Disk blocks are allocated at creation: a full disk then raises OSError here, instead of SIGBUS at a later write to the map.
    Raises ManifestError if an existing file has another dtype or shape.
    """
    if path.is_file():
        array = np.load(path, mmap_mode="r+")
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise ManifestError(f"{path}: holds {array.dtype} {array.shape}, wanted {np.dtype(dtype)} {shape}; remove its folder")
        return array
    temporary = path.with_name(f"{path.name}.new")
    array = np.lib.format.open_memmap(temporary, "w+", np.dtype(dtype), shape)
    with temporary.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, temporary.stat().st_size)
    del array
    temporary.replace(path)
    return np.load(path, mmap_mode="r+")


class GrowingArray:
    """A flat .npy file that is appended to and whose length is known only at the end."""

    HEADER = 128  # bytes reserved for numpy's header, with room for the final length

    def __init__(self, path: Path, dtype: DTypeLike, length: int = 0) -> None:
        """Open `path` to append after its first `length` elements; the file is truncated there."""
        self.dtype, self.length = np.dtype(dtype), length
        path.touch()
        self.stream: IO[bytes] = path.open("r+b")
        self.stream.truncate(self.HEADER + length * self.dtype.itemsize)
        self._header()
        self.stream.seek(0, os.SEEK_END)

    def append(self, part: NDArray[Any]) -> None:
        """Add elements."""
        self.stream.write(part.astype(self.dtype).tobytes())
        self.length += len(part)

    def flush(self) -> None:
        """Write buffered elements to the file."""
        self.stream.flush()

    def close(self) -> None:
        """Write the final length."""
        self._header()
        self.stream.close()

    def _header(self) -> None:
        self.stream.seek(0)
        np.lib.format.write_array_header_1_0(self.stream, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)})
