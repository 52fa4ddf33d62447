"""What JSON, as Python reads it, lets a client say and nobody could act on: a key twice, numbers that are none, integers without end, half characters."""

import json
import math
import re
from collections import Counter
from typing import Any

from memdec.server.errors import RequestError

LARGEST = 1 << 63  # what the engine's messages can carry
SUSPECT = re.compile(r"[0-9]{19}|NaN|Infinity|[0-9][eE]\+?[0-9]{2}")  # texts without any of these hold no number to refuse
SHOWN = 80  # characters of a name in a message


def require_plain(raw: bytes) -> None:
    """Raise RequestError, by name, for a body that says something that could only be dropped or misread; ValueError for what is no JSON."""
    text = raw.decode(json.detect_encoding(raw), "surrogatepass")
    try:
        body = json.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None
    if "\\ud" in text.lower():
        _require_unicode(body)
    if isinstance(body, dict) and SUSPECT.search(text):
        for field, value in body.items():
            _require_numbers(field[:SHOWN], value)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One object. Which of two values is meant nobody knows: Python takes the last, others the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RequestError(f"The body has the key {name[:SHOWN]!r} twice in one object. Name it once.", name[:SHOWN])
    return found


def _require_unicode(body: Any) -> None:
    """JSON can spell half of a surrogate pair, which UTF-8 can't: on its way to the engine it would end as a 500."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("The body has half of a surrogate pair (\\ud800 to \\udfff alone), which is not text.") from None


def _require_numbers(field: str, value: Any) -> None:
    """JSON's integers have no end, the engine's have; its floats are finite, but Python reads NaN, Infinity and 1e999 too."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, int) and not -LARGEST <= node < LARGEST:
            raise RequestError(f"{field} holds an integer that doesn't fit 64 bits.", field)
        if isinstance(node, float) and not math.isfinite(node):
            raise RequestError(f"{field} holds a number that isn't finite: NaN, Infinity, or beyond 1e308.", field)
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
