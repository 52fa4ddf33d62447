"""Arrays on disk that are filled piece by piece."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


def create_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> Any:
    """A new .npy file of that type and shape, as a writable memory map.

    Its blocks are reserved first: on a full disk that is an OSError, where writing to the map would kill the process.
    """
    array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    with path.open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return array
