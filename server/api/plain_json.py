"""Strict JSON: refuses what Python's parser accepts but the server can't use: duplicate keys, NaN and Infinity, huge integers, lone surrogates."""

import json
import math
import re
from collections import Counter

from memdec.server.errors import RequestError

LARGEST = 1 << 63  # what the engine's messages can carry
SUSPECT = re.compile(r"[0-9]{19}|NaN|Infinity|[0-9][eE]\+?[0-9]{2}")  # texts without any of these hold no number to refuse
SHOWN = 80  # characters of a name in a message


def require_plain(raw: bytes) -> None:
    """Raise RequestError, naming the field, for a value that could only be dropped or misread; ValueError for what is no JSON."""
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


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """One object. Duplicate keys are refused: Python takes the last value, other parsers the first."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RequestError(f"The body has the key {name[:SHOWN]!r} twice in one object. Name it once.", name[:SHOWN])
    return fields


def _require_unicode(body: object) -> None:
    """Refuse a lone surrogate: JSON can spell one, UTF-8 can't, so it would fail on the way to the engine with a 500."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("The body has half of a surrogate pair (\\ud800 to \\udfff alone), which is not text.") from None


def _require_numbers(field: str, value: object) -> None:
    """Refuse integers that the engine's messages can't carry, and NaN, Infinity and 1e999, which Python reads but JSON doesn't have."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, int) and not -LARGEST <= node < LARGEST:
            raise RequestError(f"{field} holds an integer that doesn't fit 64 bits.", field)
        if isinstance(node, float) and not math.isfinite(node):
            raise RequestError(f"{field} holds a number that isn't finite: NaN, Infinity, or beyond 1e308.", field)
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
