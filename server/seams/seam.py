"""One row of the ledger."""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """How code of ours depends on vLLM's."""

    OVERRIDE = "a subclass of ours overrides it, or is built from it"
    BECOME = "an object that vLLM has made gets our subclass for its class"
    WRITE = "we give it another value"
    READ = "we read or call it, though it isn't vLLM's public interface"
    NAME = "vLLM finds ours, or we find vLLM's, by a name in a string"
    FAULT = "a fault that we work around: when the text is gone, so may be what works around it"


LOUD = "loudly, when the module that uses it is imported"
STARTS = "loudly, when the server starts"
USED = "loudly, when it is used"


@dataclass(frozen=True)
class Seam:
    """A place of vLLM's that we lean on. `server` need not be in the names of `used_by`."""

    target: str
    """`module:Class.attribute`, `module:function` or `module:`; the class that defines it."""
    kind: Kind
    used_by: tuple[str, ...]
    """Our files, from `server/` on."""
    why: str
    fails: str
    """How we notice, without the tests, that upstream has moved it."""
    dropped_when: str
    """The upstream change that would let us remove our part; "never" for what is ordinary use of an interface."""
    parameters: tuple[str, ...] = ()
    """The first parameters, in their order."""
    complete: bool = False
    """Whether there are no others."""
    accepts: tuple[str, ...] = ()
    """Further parameters, wherever they are."""
    has: tuple[str, ...] = ()
    """Attributes, fields included, of a class or module."""
    source: tuple[str, ...] = ()
    """Text that its source contains."""
    in_order: tuple[str, ...] = ()
    """The same, each after the one before."""
    without: tuple[str, ...] = ()
    """Text that its source doesn't contain."""
