"""Limits on the number of lists and objects in a request's body: vLLM validates each of them on the event loop, which blocks all other clients."""

from memdec.server.errors import RequestError

LONGEST_LIST = 10_000
MOST_NESTED = 2_048
"""Lists and objects in one list or object, such as messages, their parts, or tools."""
MOST_IN_ALL = 8_192
"""Lists and objects in a whole body."""
TOKENS = ("prompt", "tokens", "allowed_token_ids")  # not counted: cheap to validate, and bounded by the context length or the vocabulary


def require_bounded(body: object) -> None:
    """Raise RequestError, naming the field, for lists and objects that are too long, or too many. Stops reading at the limit."""
    waiting, count = [("", body)], 0
    while waiting:
        field, node = waiting.pop()
        flat = field in TOKENS and isinstance(node, list) and not (node and isinstance(node[0], dict | list))
        if flat or not isinstance(node, dict | list):
            continue
        _require(len(node) <= LONGEST_LIST, field, f"has {len(node):,} entries, wanted at most {LONGEST_LIST:,}")
        items = node.items() if isinstance(node, dict) else ((field, value) for value in node)
        nested = [(field or str(name), value) for name, value in items if isinstance(value, dict | list)]
        _require(len(nested) <= MOST_NESTED, field, f"has {len(nested):,} lists or objects, wanted at most {MOST_NESTED:,}")
        count += len(nested)
        _require(count <= MOST_IN_ALL, field, f"has, with what is in it, over {MOST_IN_ALL:,} lists and objects")
        waiting += nested


def _require(fits: bool, field: str, what: str) -> None:
    if not fits:
        raise RequestError(f"{field[:80] or 'The body'} {what}.", field[:80] or None)
