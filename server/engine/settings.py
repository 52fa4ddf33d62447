"""Settings of the engine client's parts, in a file that imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

LOAD_SECONDS = 300.0


@dataclass(frozen=True)
class UpdateOptions:
    """How domains may change while the server runs."""

    slots: int
    """Decoders that may be loaded at once."""
    roots: tuple[Path, ...]
    """Folders that decoders may be loaded from, symbolic links resolved."""
    admin_key: str = field(default="", repr=False)
    """The key that changes them."""
    seconds: float = LOAD_SECONDS
    """How long reading, checking and loading one decoder may take."""
