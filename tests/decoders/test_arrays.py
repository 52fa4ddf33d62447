"""Arrays on a disk that is too small."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from memdec.decoders.arrays import fill_array

TOO_LARGE = """
import resource, sys
from pathlib import Path
from memdec.decoders.arrays import fill_array
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    fill_array(Path(sys.argv[1]), "float16", (1000, 100))
except OSError:
    sys.exit(42)
"""


def test_arrays_are_filled_in_place(tmp_path: Path) -> None:
    """And read back as ordinary .npy files."""
    array = fill_array(tmp_path / "a.npy", np.float16, (10, 3))
    array[4] = 7
    array.flush()
    assert np.load(tmp_path / "a.npy")[4].tolist() == [7, 7, 7]


def test_no_room_is_an_os_error(tmp_path: Path) -> None:
    """Not the death of the process at the first write."""
    done = subprocess.run([sys.executable, "-c", TOO_LARGE, str(tmp_path / "a.npy")], timeout=60)
    assert done.returncode == 42
