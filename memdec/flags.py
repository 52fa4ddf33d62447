"""One field of a dataclass, one option of a command line: name, type, default, bounds and help are written once."""

from argparse import Namespace, _ActionsContainer
from dataclasses import Field, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Protocol, TypeVar, get_args, get_origin, get_type_hints

from memdec.server.errors import StartupError


class Dataclass(Protocol):
    """Anything that @dataclass has decorated."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Options = TypeVar("Options", bound=Dataclass)


def flag(default: Any, text: str, metavar: str | None = None, least: float | None = None, most: float | None = None) -> Any:
    """A field that is an option. Its annotation says how it is read: `bool` takes no value, a tuple may be given several times.

    `text` is its help; numbers outside `least` to `most` are refused.
    """
    return field(default=default, metadata={"help": text, "metavar": metavar, "least": least, "most": most})


def spelling(name: str) -> str:
    """A field's name as it is written on a command line."""
    return f"--{name.replace('_', '-')}"


def add(parser: _ActionsContainer, options: type[Dataclass]) -> None:
    """Declare an option for every field."""
    hints = get_type_hints(options)
    for f in fields(options):
        kind, many = _kind(hints[f.name])
        text = f.metadata["help"].replace("%", "%%")
        if f.default not in (None, False, ()) and "(default" not in text:
            text += " (default: %(default)s)"
        if kind is bool:
            parser.add_argument(spelling(f.name), action="store_true", help=text)
        else:
            shown = f.metadata.get("metavar") or {Path: "FILE", int: "N"}.get(kind)
            more: dict[str, Any] = {"action": "append", "default": []} if many else {"default": f.default}
            parser.add_argument(spelling(f.name), type=kind, metavar=shown, help=text, **more)


def read(options: type[Options], parsed: Namespace) -> Options:
    """The options of a parsed command line. Raises StartupError that names one whose number is out of bounds."""
    values = {f.name: getattr(parsed, f.name) for f in fields(options)}
    for f in fields(options):
        value, least, most = values[f.name], f.metadata.get("least"), f.metadata.get("most")
        if isinstance(value, list):
            values[f.name] = tuple(value)
        elif isinstance(value, int | float) and not _within(value, least, most):
            wanted = (
                f"from {least:g} to {most:g}" if None not in (least, most) else f"from {least:g}" if most is None else f"up to {most:g}"
            )
            raise StartupError(f"{spelling(f.name)} {value}: wanted a number {wanted}")
    return options(**values)


def words(options: Dataclass) -> list[str]:
    """The command line that says the same, defaults left out; paths are absolute."""
    line: list[str] = []
    for f in fields(options):
        value = getattr(options, f.name)
        if value == f.default:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            line.append(spelling(f.name))
            if one is not True:
                line.append(str(one.absolute() if isinstance(one, Path) else one))
    return line


def _within(value: float, least: float | None, most: float | None) -> bool:
    """False for NaN as well, where there are bounds."""
    return (least is None or value >= least) and (most is None or value <= most)


def _kind(hint: Any) -> tuple[Any, bool]:
    """What reads one value, and whether there may be several: `int | None` is (int, False), `tuple[Path, ...]` is (Path, True)."""
    if isinstance(hint, UnionType):
        (hint,) = (t for t in get_args(hint) if t is not NoneType)
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)
