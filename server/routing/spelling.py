"""Refuses misspelt names of our fields: a request that says `domian` would be answered by the base alone, and its client would never know."""

from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import islice

from memdec.server.errors import RequestError
from memdec.server.routing.selection import FIELDS, SHARE, SOURCES, STRIDE

NAMES = (*FIELDS, STRIDE, SOURCES, SHARE)
SHORT = {"lam": "lambda", "λ": "lambda"}  # share too few letters with what they mean
ALIKE = 0.75  # the least ratio, as difflib has it, for two names to count as alike
LOOKED_AT = 64  # unknown names that are compared in a request; each takes up to some 100 µs


def meant(name: str) -> str | None:
    """The field of ours that an unknown name probably stands for, or None. Upper case, dashes and the header's X- are ignored."""
    if name in NAMES:
        return None
    plain = "".join(letter for letter in name[:40].casefold() if letter.isalpha())
    if plain in SHORT:
        return SHORT[plain]
    ratios = {ours: max(_alike(plain, ours), _alike(plain.removeprefix("x"), ours)) for ours in NAMES}
    best = max(ratios, key=lambda ours: ratios[ours])
    return best if ratios[best] >= ALIKE else None


def require_spelt_fields(names: Iterable[str], where: str = "") -> None:
    """Raise RequestError for the first unknown body field that is nearly one of ours. `where` goes before its name in the message."""
    for count, name in enumerate(names):
        if count == LOOKED_AT:
            raise RequestError(f"The body has over {LOOKED_AT} fields that this server doesn't know.")
        if (ours := meant(name)) is not None:
            raise RequestError(f"{where}{name[:40]!r} is no field of this server. Did you mean {ours!r}?", name[:40])


def require_spelt_headers(names: Iterable[str]) -> None:
    """Raise RequestError for the first header that is nearly one of ours. Names must be closer than those of fields, since clients can't help what gateways add."""
    known = {f"x-{field}": field for field in FIELDS}
    for name in islice((name.lower() for name in names), LOOKED_AT):
        ours = meant(name) if name.startswith("x-") and name not in known else None
        if ours in FIELDS and abs(len(name) - len(f"x-{ours}")) <= 1:
            raise RequestError(f"{name!r} is no header of this server. Did you mean 'X-{ours.capitalize()}'?", name)


def _alike(name: str, ours: str) -> float:
    """How alike two names are, from 0 to 1; 1 also for the same letters in another order."""
    ours = ours.replace("_", "")
    if sorted(name) == sorted(ours):
        return 1.0
    shared = len(set(name) & set(ours))  # comparing properly takes a hundred times as long
    return SequenceMatcher(None, name, ours, autojunk=False).ratio() if 2 * shared >= len(set(ours)) else 0.0
