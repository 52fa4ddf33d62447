"""NAME=PATH on the command line, and folders of packages: checked without reading a model."""

from collections.abc import Iterable
from pathlib import Path

from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE, RECORD
from memdec.server.errors import StartupError


def parse_named(flag: str, text: str) -> tuple[str, str]:
    """Split NAME=PATH. Raises StartupError."""
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise StartupError(f"{flag} {text}: wanted NAME=PATH")
    if not DOMAIN.fullmatch(name):
        raise StartupError(f"{flag} {text}: the name {name!r} must be {DOMAIN_RULE}")
    return name, path


def packages_in(folders: Iterable[Path | str]) -> list[str]:
    """NAME=PATH for every decoder package in these folders, named like its own folder. Raises StartupError if a folder has none.

    Folders without `memory_decoder.json`, such as a base model's, and hidden ones are none.
    """
    packages = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise StartupError(f"--decoder-dir {folder}: no such folder")
        here = sorted(p.parent for p in Path(folder).glob(f"*/{RECORD}") if not p.parent.name.startswith("."))
        if not here:
            raise StartupError(f"--decoder-dir {folder}: no folder in it has a {RECORD}; memdec build makes such packages")
        for path in here:
            if not DOMAIN.fullmatch(path.name):
                raise StartupError(f"--decoder-dir {folder}: the name {path.name!r} must be {DOMAIN_RULE}")
        packages += [f"{path.name}={path.resolve()}" for path in here]
    return packages


def require_folder(model: str) -> None:
    """Raise StartupError unless a model is a local folder, or may be a hub id, OWNER/NAME."""
    if not Path(model).is_dir() and (Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") != 1):
        raise StartupError(f"{model}: no such folder")
