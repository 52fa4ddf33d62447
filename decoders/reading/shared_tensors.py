"""Tensors that a decoder shares with its base, which a package of format 2 names by their hash instead of holding them again.

A decoder that starts from layers of its base keeps the base's embeddings, and where they are tied its output head: two thirds of its bytes and
more. A complete folder, with all tensors in one file, is what transformers and vLLM load: `memdec standalone` writes one, and a server keeps one in
its cache.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

from memdec.decoders.reading.errors import ManifestError, PackageError
from memdec.decoders.reading.files import json_hash, open_regular, read_bytes, reason, shown
from memdec.decoders.reading.names import RECORD
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.record import FORMAT, SharedTensor
from memdec.decoders.reading.tokenizer import COPIED
from memdec.decoders.reading.weights import INDEX, Tensor, pieces, read_header, weight_files

WEIGHTS = "model.safetensors"  # the only weight file of a package that leaves tensors out
LEAST = 1 << 20  # bytes from which on a tensor is left out
MOST_OTHER = 256 << 20  # bytes of the other files, tokenizer and configuration
NOT_COPIED = {RECORD, INDEX, "manifest.json"}  # the manifest is the package's, not the complete folder's


def find_shared(decoder: Path, base: Path) -> dict[str, SharedTensor]:
    """The decoder's tensors of LEAST bytes and more that the base has bit for bit, by name; none if its weights are in several files."""
    if not (decoder / WEIGHTS).is_file() or os.path.lexists(decoder / INDEX):
        return {}
    large = {tensor.name: tensor for tensor in _tensors(decoder / WEIGHTS) if tensor.end - tensor.begin >= LEAST}
    theirs = {
        t.name: t
        for file in weight_files(base)
        for t in _tensors(file)
        if (t.dtype, t.shape) in {(o.dtype, o.shape) for o in large.values()}
    }
    by_hash = {digest: name for name, digest in _digests(base, set(theirs)).items()}
    own = _digests(decoder, set(large)) if by_hash else {}
    return {name: SharedTensor(tensor=by_hash[digest], sha256=digest) for name, digest in own.items() if digest in by_hash}


def leave_out(weights: Path, shared: Mapping[str, SharedTensor]) -> None:
    """Write a weight file anew without the shared tensors. Raises OSError."""
    kept = {name: tensor for name, tensor in load_file(weights).items() if name not in shared}
    save_file(kept, weights, {"format": "pt"})


def completed(package: Package, base: Path, cache: Path, within: Sequence[Path] = ()) -> Package:
    """The package itself if it has all its tensors; else its complete folder in `cache`, which is made if it isn't there.

    `within`: each file of the package, symbolic links resolved, must lie in one of these folders; empty: anywhere. Raises PackageError if the base
    is another than the one that it shares tensors with, and ManifestError if nothing can be written; nothing is left half-made.
    """
    shared = package.record.shared
    if not shared:
        return package
    out = cache / f"{package.path.name}-{json_hash([package.revision, {n: s.sha256 for n, s in shared.items()}])[:32]}"
    if out.is_dir():
        require_base(package, base)
    else:
        write_standalone(package, base, out, within)
    return Package.read(out)


def write_standalone(package: Package, base: Path, out: Path, within: Sequence[Path] = ()) -> None:
    """Write a package's complete folder, of format 1, which doesn't exist yet. Raises PackageError and ManifestError; leaves nothing half-made."""
    if not package.record.shared:
        raise PackageError(f"{package.path}: is complete already; it shares no tensor with its base")
    if os.path.lexists(out):
        raise ManifestError(f"{out}: is there already; wanted a new folder")
    require_base(package, base)
    with _whole(out) as folder:
        left = MOST_OTHER
        others = {file for pattern in (*COPIED, "README.md") for file in package.path.glob(pattern)}
        for file in sorted(file for file in others if file.name not in NOT_COPIED):
            data = read_bytes(file, left, within)
            left -= len(data)
            (folder / file.name).write_bytes(data)
        record = package.record.model_copy(update={"format": FORMAT, "shared": {}})
        (folder / RECORD).write_text(record.model_dump_json(indent=1, by_alias=True, exclude_none=True, exclude={"shared"}) + "\n")
        tensors = load_file(package.path / WEIGHTS)
        for file in weight_files(base):
            theirs = load_file(file)
            tensors |= {name: theirs[s.tensor] for name, s in package.record.shared.items() if s.tensor in theirs}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors creates its files for the owner alone


def require_base(package: Package, base: Path) -> None:
    """Raise PackageError unless the base has every tensor that the package shares, bit for bit."""
    shared = package.record.shared
    theirs = _digests(base, {s.tensor for s in shared.values()}) if shared else {}
    for name, tensor in shared.items():
        if theirs.get(tensor.tensor) != tensor.sha256:
            found = theirs.get(tensor.tensor, "no such tensor")
            raise PackageError(
                f"{package.path}: shares {shown(name)} with the base that it was built from, and {base} has {found}, wanted {tensor.sha256}; "
                "beside another base it needs `memdec standalone`, with --base the one that it was built from"
            )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is renamed to it at the end, or removed. Raises ManifestError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as partial:
            made = Path(partial) / "made"
            made.mkdir()
            yield made
            if out.is_dir():  # another process was faster
                shutil.rmtree(made)
            else:
                made.rename(out)
    except OSError as error:
        raise ManifestError(f"{error.filename or out}: {reason(error)}; nothing was written") from None


def _tensors(file: Path) -> list[Tensor]:
    with open_regular(file) as stream:
        return read_header(stream, file)[1]


def _digests(folder: Path, names: set[str]) -> dict[str, str]:
    """SHA-256 of the tensors of these names that a folder has: of type, shape and bytes."""
    digests = {}
    for file in weight_files(folder):
        with open_regular(file) as stream:
            start, tensors = read_header(stream, file)
            for tensor in (t for t in tensors if t.name in names):
                stream.seek(start + tensor.begin)
                digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
                for piece in pieces(stream, tensor, file):
                    digest.update(piece)
                digests[tensor.name] = digest.hexdigest()
    return digests
