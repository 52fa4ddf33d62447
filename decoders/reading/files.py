"""Read files that are not trusted, and may still be changing: regular files alone, opened without blocking, read up to a limit.

Whoever can write into a model folder can put a named pipe there, a folder called `model.safetensors`, a link that leads elsewhere, or endless
JSON, and can exchange files at any time. So kind and location are checked on the opened file descriptor, and a file is read once.
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

MOST_JSON = 1 << 20  # bytes of a config or a record, which have about a kilobyte
MOST_NESTED = 32  # depth of nested lists and objects
SHOWN = 80  # characters of a value that a message repeats
KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def open_regular(path: Path, within: Sequence[Path] = ()) -> BufferedReader:
    """Open a regular file for reading, without blocking even if the path is a pipe or a device. The caller closes it.

    `within`: the file, symbolic links resolved, must lie in one of these folders; if empty, anywhere. Raises PackageError naming the file.
    """
    try:
        # O_PATH only resolves the path: opening a pipe would wait for its other end, and opening a device might have effects.
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
    """All bytes of a regular file. Raises PackageError if it has more than `most`, even if it grows while it is read."""
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
    """Raise PackageError if a value is nested too deep to be compared or printed, or holds a lone surrogate, which no response can contain."""
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
    """Whether a text can be encoded as UTF-8; lone surrogates, which JSON and file names allow, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """A value for an error message: its repr, in printable characters, cut to SHOWN."""
    text = ascii(value) if isinstance(value, str) and not is_utf8(value) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def sendable(text: str, most: int = 500) -> str:
    """A message as one line of valid UTF-8, cut to `most` characters; bytes of file names that are not text are escaped."""
    line = " ".join(text.split())
    return (line if len(line) <= most else f"{line[:most]}…").encode("utf-8", "backslashreplace").decode()


def reason(error: Exception) -> str:
    """The text of an OSError, or of the ValueError that a path with a NUL byte raises."""
    return getattr(error, "strerror", None) or str(error)
