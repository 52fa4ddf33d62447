"""How many things a request's body may hold: what vLLM does with each of them is done on the event loop, while every other client waits."""

from typing import Any

from memdec.server.errors import RequestError

LONGEST_LIST = 10_000
MOST_NESTED = 2_048
"""Lists and objects in one list or object, such as messages, their parts, or tools."""
MOST_IN_ALL = 8_192
"""Lists and objects in a whole body."""
TOKENS = ("prompt", "tokens", "allowed_token_ids")  # cheap to read by the million, and the context or the vocabulary bounds them


def require_bounded(body: Any) -> None:
    """Raise RequestError, naming the field, for lists and objects that are too long, or too many. Reads no more of the body than it allows."""
    waiting, found = [("", body)], 0
    while waiting:
        field, node = waiting.pop()
        flat = field in TOKENS and isinstance(node, list) and not (node and isinstance(node[0], dict | list))
        if flat or not isinstance(node, dict | list):
            continue
        _require(len(node) <= LONGEST_LIST, field, f"has {len(node):,} entries, wanted at most {LONGEST_LIST:,}")
        items = node.items() if isinstance(node, dict) else ((field, value) for value in node)
        nested = [(field or str(name), value) for name, value in items if isinstance(value, dict | list)]
        _require(len(nested) <= MOST_NESTED, field, f"has {len(nested):,} lists or objects, wanted at most {MOST_NESTED:,}")
        found += len(nested)
        _require(found <= MOST_IN_ALL, field, f"has, with what is in it, over {MOST_IN_ALL:,} lists and objects")
        waiting += nested


def _require(fits: bool, field: str, what: str) -> None:
    if not fits:
        raise RequestError(f"{field[:80] or 'The body'} {what}.", field[:80] or None)
