"""Birth certificates: every artifact says what made it, and appears whole or not at all."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from decoders.errors import ManifestError

NAME = "manifest.json"
Manifest = dict[str, Any]  # the inputs of one artifact: hashes, options, versions; anything JSON can hold


def fingerprint(manifest: Manifest) -> str:
    """Hash of a manifest's inputs, to chain into the manifests of what is made from the artifact."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def hash_files(folder: Path, pattern: str) -> str:
    """Hash of the names and bytes of the files in `folder` that match. Raises ManifestError when none does."""
    digest, files = hashlib.sha256(), sorted(folder.glob(pattern))
    if not files:
        raise ManifestError(f"{folder}: no {pattern} file in it")
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def stage(out: Path, manifest: Manifest) -> Iterator[Path | None]:
    """Make the artifact folder `out` whole or not at all.

    Yields None when `out` already holds an artifact made from the same inputs; otherwise a temporary folder beside it, which
    is renamed to `out` when the block ends without an error and removed when it doesn't. Raises ManifestError on a full disk.
    """
    if is_fresh(out, manifest):
        print(f"{out.name}: fresh, kept", flush=True)
        yield None
        return
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    started = time.monotonic()
    try:
        temporary.mkdir(parents=True)
        yield temporary
        record = {"inputs": manifest, "seconds": round(time.monotonic() - started, 1)}
        (temporary / NAME).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        temporary.replace(out)
    except (OSError, SafetensorError) as error:
        where, why = getattr(error, "filename", None) or out, getattr(error, "strerror", None) or error
        raise ManifestError(f"{where}: {why}; nothing was kept of this stage") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
