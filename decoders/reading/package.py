"""A decoder package, read and checked: an ordinary Hugging Face folder plus `memory_decoder.json`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import MOST_JSON, parse_json, read_bytes, read_json, shown
from memdec.decoders.reading.names import RECORD
from memdec.decoders.reading.record import FORMAT, SHARING, Config, Record, checked
from memdec.decoders.reading.weights import CONFIG, Scanned, check_weights, fingerprint_model, revision_of, scan


@dataclass(frozen=True)
class Package:
    """A decoder folder, checked: its config, record, hashes and tuned lambda."""

    path: Path
    config: dict[str, Any]
    """The folder's config.json."""
    record: Record
    """Its memory_decoder.json; a plain checkpoint has the defaults."""
    weights: Scanned
    """Hashes and size of its weight files."""
    revision: str
    """Hash of config and weights."""
    lam: float
    """Lambda tuned for the base that the folder is opened for, or the default."""
    tuned: bool = False
    """Whether `lam` was tuned on that base."""
    perplexity: dict[str, Any] = field(default_factory=dict)
    """Test perplexities measured with that base; empty if there are none."""

    @classmethod
    def open(cls, path: Path, base: Path | None = None) -> "Package":
        """Read and check a package or a plain checkpoint. Raises PackageError, one line, if it can't be served."""
        package = cls.read(path)
        return package if base is None else package.beside(lambda: fingerprint_model(base))

    @classmethod
    def read(cls, path: Path, within: Sequence[Path] = (), most: int | None = None) -> "Package":
        """Like `open`, without a base.

        `within`: every file, symbolic links resolved, must lie in one of these folders; if empty, anywhere. `most`: limit on the weights' bytes.
        """
        data = read_bytes(path / CONFIG, MOST_JSON, within)
        config = parse_json(data, path / CONFIG)
        checked(Config, config, path / CONFIG)
        record = read_record(path, within) or Record()
        check_weights(path, within, most)
        weights = scan(path, within)
        return cls(path, config, record, weights, revision_of(data, weights.digests), record.lam)

    def beside(self, base: Callable[[], str]) -> "Package":
        """Copy of the package with lambda and perplexities of a base.

        `base` returns the base's revision; it is called only if the record has figures.
        """
        figures = self.record.bases.get(base()) if self.record.bases else None
        if figures is None:
            return self
        lam = self.lam if figures.lam is None else figures.lam
        return replace(self, lam=lam, tuned=figures.lam is not None, perplexity=figures.to_json())

    @property
    def domain(self) -> str | None:
        """Name given in training; None for a plain checkpoint."""
        return self.record.domain

    @property
    def tokenizer(self) -> str | None:
        """Hash of the token -> id map it was trained with."""
        return self.record.token_map

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return self.weights.size


def read_record(path: Path, within: Sequence[Path] = ()) -> Record | None:
    """`memory_decoder.json`, or None for a plain checkpoint. Raises PackageError."""
    if not os.path.lexists(path / RECORD):
        return None
    fields = read_json(path / RECORD, within)
    if fields.get("format") not in (FORMAT, SHARING):
        raise PackageError(f"{path / RECORD}: format is {shown(fields.get('format'))}, this version reads {FORMAT} and {SHARING}")
    record = checked(Record, fields, path / RECORD)
    if record.shared and record.format != SHARING:
        raise PackageError(f"{path / RECORD}: shared is of format {SHARING}, format is {record.format}")
    return record
