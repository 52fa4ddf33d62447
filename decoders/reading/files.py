"""Files that somebody else has written, and may be writing still: regular ones alone, opened without waiting, read within bounds.

Whoever may write into a folder may put a named pipe there, a folder called `model.safetensors`, a link to somewhere else, or JSON without end,
and may swap files between two looks at them. So a file's kind and place are those of what was opened, and what is used is what was read.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from memdec.decoders.reading.errors import PackageError

MOST_JSON = 1 << 20  # bytes of a config or a record: a thousand times what they have
MOST_NESTED = 32  # lists and objects within each other
SHOWN = 80  # characters of a value that a message repeats
KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def open_regular(path: Path, within: Sequence[Path] = ()) -> BufferedReader:
    """Open a regular file for reading; whatever the name leads to, this returns at once. The caller closes it.

    `within`: folders of which one must hold the file, symbolic links followed; empty: it may lie anywhere. Raises PackageError naming it.
    """
    try:
        # O_PATH opens nothing yet: a pipe would wait for its other end, and a device might act.
        seen = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise PackageError(f"{path}: {reason(error)}") from None
    try:
        mode, here = os.fstat(seen).st_mode, f"/proc/self/fd/{seen}"
        if not stat.S_ISREG(mode):
            raise PackageError(f"{path}: is a {next((name for of, name in KINDS if of(mode)), 'special file')}, wanted a regular file")
        if within and not any(Path(here).readlink().is_relative_to(root) for root in within):
            raise PackageError(f"{path}: is a link to outside of {', '.join(map(str, within))}")
        return os.fdopen(os.open(here, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise PackageError(f"{path}: {reason(error)}") from None
    finally:
        os.close(seen)


def read_bytes(path: Path, most: int, within: Sequence[Path] = ()) -> bytes:
    """All bytes of a regular file. Raises PackageError if it has more than `most`, however it grows meanwhile."""
    with open_regular(path, within) as stream:
        try:
            data = stream.read(most + 1)
        except OSError as error:
            raise PackageError(f"{path}: {reason(error)}") from None
    if len(data) > most:
        raise PackageError(f"{path}: more than {most:,} bytes, wanted fewer")
    return data


def read_json(path: Path, within: Sequence[Path] = (), most: int = MOST_JSON) -> dict[str, Any]:
    """A JSON object from a file, safe to compare, print and send on. Raises PackageError naming the file."""
    return parse_json(read_bytes(path, most, within), path)


def parse_json(data: bytes, name: object) -> dict[str, Any]:
    """A JSON object from the bytes of `name`. Raises PackageError unless it is one, not too deep, its texts UTF-8."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise PackageError(f"{name}: more than {MOST_NESTED} lists and objects within each other, wanted fewer") from None
    except ValueError as error:
        raise PackageError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise PackageError(f"{name}: wanted a JSON object, found {type(value).__name__}")
    _require_sound(value, name)
    return value


def _require_sound(value: object, name: object) -> None:
    """Raise PackageError if a value is nested too deep to be compared or printed, or holds half a surrogate pair, which no answer can carry."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > MOST_NESTED + 1:
            raise PackageError(f"{name}: more than {MOST_NESTED} lists and objects within each other, wanted fewer")
        inner: list[object] = []
        for one in level:
            if isinstance(one, str) and not is_utf8(one):
                raise PackageError(f"{name}: the text {shown(one)} is not UTF-8 (half a surrogate pair)")
            inner += [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        level = inner


def json_hash(value: Any) -> str:
    """Hash of a value that JSON can hold, 16 hexadecimal digits; the order of keys doesn't matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def is_utf8(text: str) -> bool:
    """Whether a text can be sent: JSON, and file names, may hold half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value as a message repeats it: cut, in printable characters."""
    text = ascii(value) if isinstance(value, str) and not is_utf8(value) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def sendable(text: str, most: int = 500) -> str:
    """A message in one line that an answer can carry: file names, as JSON, may hold bytes that are no text."""
    line = " ".join(text.split())
    return (line if len(line) <= most else f"{line[:most]}…").encode("utf-8", "backslashreplace").decode()


def reason(error: Exception) -> str:
    """What an OSError, or the ValueError of a path with a NUL in it, says in words."""
    return getattr(error, "strerror", None) or str(error)
