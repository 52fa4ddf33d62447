"""Birth certificates: every artifact says what made it, and appears whole or not at all.

A stage works in a hidden folder beside its artifact, `.NAME.partial`. What a killed run left there is gone on with if it was
made from the same inputs, and thrown away if not; a finished folder is renamed into place.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from memdec.decoders import parallel
from memdec.decoders.reading.errors import ManifestError
from memdec.decoders.reading.files import json_hash

NAME = "manifest.json"
INPUTS = "inputs.json"  # what a partial folder is being made from
BOOKMARK = ".bookmark"  # suffix of the files that say how far a part has come
Manifest = dict[str, Any]  # the inputs of one artifact: hashes, options, versions; anything JSON can hold


def fingerprint(manifest: Manifest) -> str:
    """Hash of a manifest's inputs, to chain into the manifests of what is made from the artifact."""
    return json_hash(manifest)


@contextlib.contextmanager
def stage(out: Path, manifest: Manifest) -> Iterator[Path | None]:
    """Make the artifact folder `out` whole or not at all.

    Yields None when `out` already holds an artifact made from the same inputs; otherwise the partial folder, with what a
    killed run from the same inputs left in it. Raises ManifestError on a full disk, or while another process makes `out`.
    """
    if is_fresh(out, manifest):
        if parallel.rank() == 0:
            print(f"{out.name}: fresh, kept", flush=True)
        yield None
        return
    refuse_foreign(out)
    partial = out.with_name(f".{out.name}.partial")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if parallel.rank() == 0:
            stack.enter_context(_owned(partial, out))
        try:
            if parallel.rank() == 0:
                _prepare(partial, manifest)
            parallel.barrier()
            yield partial
            parallel.barrier()
            if parallel.rank() == 0:
                _finish(partial, out, {"inputs": manifest, "seconds": round(time.monotonic() - started, 1)})
            parallel.barrier()
        except (OSError, SafetensorError) as error:
            kept = _keep_or_remove(partial)
            where, why = getattr(error, "filename", None) or out, getattr(error, "strerror", None) or error
            raise ManifestError(f"{where}: {why}; {kept}") from error
        except Exception:
            _keep_or_remove(partial)
            raise


def refuse_foreign(out: Path) -> None:
    """Raise ManifestError if `out` holds something that is no artifact: it would be replaced."""
    if out.is_dir() and any(out.iterdir()) and not (out / NAME).is_file():
        raise ManifestError(f"{out}: is not empty and no artifact of memdec (no {NAME}); give a new folder")
    if out.exists() and not out.is_dir():
        raise ManifestError(f"{out}: is not a folder; give a new folder")


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold a work folder for a whole build: two with different options would mix their artifacts. Raises ManifestError."""
    if parallel.rank() != 0:
        yield
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        folder = os.open(work, os.O_RDONLY)
    except OSError as error:
        raise ManifestError(f"{error.filename or work}: {error.strerror}; nothing was made") from None
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ManifestError(f"{work}: another build is at work in it; wait for it, or give another --work") from None
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def _owned(partial: Path, out: Path) -> Iterator[None]:
    """Hold the partial folder's lock. It dies with the process, so a killed run never blocks the next."""
    lock = out.with_name(f".{out.name}.lock")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        stream = lock.open("w")
    except OSError as error:
        raise ManifestError(f"{error.filename or lock}: {error.strerror}; nothing was made") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ManifestError(f"{out}: another process is making it; wait for it, or give another --work or --out") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _prepare(partial: Path, manifest: Manifest) -> None:
    """Make the partial folder, or keep one that was begun from the same inputs."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((partial / INPUTS).read_text()) == json.loads(json.dumps(manifest)):
            print(f"{partial.name[1:].removesuffix('.partial')}: going on where an earlier run stopped", flush=True)
            return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_whole(partial / INPUTS, json.dumps(manifest))


def _finish(partial: Path, out: Path, record: Manifest) -> None:
    """Turn the partial folder into the artifact."""
    for leftover in [partial / INPUTS, *partial.rglob(f"*{BOOKMARK}")]:
        leftover.unlink(missing_ok=True)
    (partial / NAME).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)


def _keep_or_remove(partial: Path) -> str:
    """After an error: keep the partial folder if something in it can be gone on with. Returns what to tell the user."""
    if any(partial.rglob(f"*{BOOKMARK}")):
        return "what was done is kept: run the same command again to go on"
    if parallel.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    return "nothing was kept of this stage"


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text at once: a reader, or the next run, sees the old or the new one."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Bookmark:
    """How far one part of a stage has come, in whatever it counts; survives SIGKILL.

    The caller flushes its data before it moves the bookmark. Nothing is written more often than every `SECONDS`.
    """

    SECONDS = 60.0

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}-{parallel.rank()}-of-{parallel.world()}{BOOKMARK}"
        self.written = time.monotonic()
        self.place: dict[str, int] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    @property
    def due(self) -> bool:
        """Whether it is time to flush and move."""
        return time.monotonic() - self.written >= self.SECONDS

    def move(self, **place: int) -> None:
        """Record the place."""
        write_whole(self.path, json.dumps(place))
        self.place, self.written = place, time.monotonic()


def is_fresh(out: Path, manifest: Manifest) -> bool:
    """True if `out` was finished from exactly these inputs."""
    try:
        found = json.loads((out / NAME).read_text())["inputs"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(found == json.loads(json.dumps(manifest)))


def read_manifest(out: Path) -> Manifest:
    """The record left in an artifact: {"inputs": ..., "seconds": ...}. Raises ManifestError if it isn't one."""
    try:
        record: Manifest = json.loads((out / NAME).read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(f"{out / NAME}: {error}") from None
    return record
