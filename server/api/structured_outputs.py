"""Limits on structured outputs that can be checked without compiling; memdec.server.engine.grammars checks what only a compile shows."""

import contextlib
import json
import re

from memdec.server.errors import RequestError
from memdec.server.json_types import JsonObject

COUNTS = {"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"}
LARGEST_COUNT = 10_000
DEEPEST = 100  # vLLM takes schemas of 64 levels, and tags around them
MOST_VALUES = 20_000  # in schemas and tags together
MOST_REFERENCES = 1_000
MOST_CHOICES = 10_000
LONGEST = 64 << 10  # characters of a grammar, an expression, a choice
LONGEST_CHOICES = 256 << 10  # characters of all choices
PLACES = ("response_format", "structured_outputs", "tools")
TEXTS = {"grammar": "grammar", "regex": "regular expression", "pattern": "regular expression"}
REPEATS = re.compile(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")
WITHOUT_EFFECT = {
    "whitespace_pattern": "No backend of this server reads it; leave it out.",
    "disable_additional_properties": 'Say "additionalProperties": false in the schema instead.',
}


def require_small(body: JsonObject) -> None:
    """Refuse schemas, grammars, regular expressions and choices that are too large, too deep or repeat too often: compile time grows with each.

    Raises RequestError that names the field.
    """
    asked = body.get("structured_outputs")
    if isinstance(asked, dict) and isinstance(asked.get("choice"), list):
        _require_few(asked["choice"])
    values = references = 0
    waiting: list[tuple[str, object, int]] = [(key, body.get(key), 0) for key in PLACES]
    while waiting:
        key, node, depth = waiting.pop()
        if isinstance(node, str):
            _require_short(key, node)
            node = _parsed(node)
        if isinstance(node, dict):
            _require_counts(node)
            references += "$ref" in node
        if isinstance(node, dict | list):
            values += len(node)
            _require(depth < DEEPEST, f"{key[:80]} is nested too deeply.", PLACES[1])
            _require(
                values <= MOST_VALUES and references <= MOST_REFERENCES,
                f"A schema has over {MOST_VALUES:,} values, or {MOST_REFERENCES:,} references.",
            )
            pairs = node.items() if isinstance(node, dict) else ((key, value) for value in node)
            waiting += [(name, value, depth + 1) for name, value in pairs]
            if isinstance(node, dict) and isinstance(node.get("patternProperties"), dict):
                waiting += [("pattern", expression, depth + 1) for expression in node["patternProperties"]]


def require_effective(body: JsonObject, compact: bool) -> None:
    """Refuse options of `structured_outputs` that would change nothing; `compact`: this server's JSON has no free white space.

    Raises RequestError that names the option.
    """
    asked = body.get("structured_outputs")
    if not isinstance(asked, dict):
        return
    for name, advice in WITHOUT_EFFECT.items():
        _require(not asked.get(name), f"structured_outputs.{name} has no effect here. {advice}", name)
    wanted = asked.get("disable_any_whitespace")
    has = "without" if compact else "with"
    _require(
        wanted is None or wanted is compact,
        f"structured_outputs.disable_any_whitespace is fixed when the server starts: JSON comes {has} free white space. Leave it out, or send "
        f"{str(compact).lower()}.",
        "disable_any_whitespace",
    )


def _require(held: bool, message: str, param: str = PLACES[1]) -> None:
    if not held:
        raise RequestError(message, param)


def _require_few(choices: list[object]) -> None:
    _require(len(choices) <= MOST_CHOICES, f"{len(choices):,} choices; this server takes at most {MOST_CHOICES:,}.", "choice")
    characters = sum(len(choice) for choice in choices if isinstance(choice, str))
    _require(characters <= LONGEST_CHOICES, f"The choices have {characters:,} characters; this server takes {LONGEST_CHOICES:,}.", "choice")


def _require_short(key: str, text: str) -> None:
    """Bounds of one text: its length, and the repetitions in what is an expression or a grammar."""
    if key not in (*TEXTS, "choice", "const", "enum"):
        return
    what = TEXTS.get(key, "value")
    _require(len(text) <= LONGEST, f"A {what} has {len(text):,} characters; this server takes at most {LONGEST:,}.", key)
    if key not in TEXTS:
        return
    for match in REPEATS.finditer(text):
        for count in filter(None, match.groups()):
            digits = count.lstrip("0")
            held = len(digits) <= len(str(LARGEST_COUNT)) and int(digits or 0) <= LARGEST_COUNT
            _require(held, f"A {what} repeats {count[:20]} times. It must be at most {LARGEST_COUNT:,}.", key)


def _require_counts(schema: JsonObject) -> None:
    for key in COUNTS & schema.keys():
        if isinstance(schema[key], int | float):
            _require(
                schema[key] <= LARGEST_COUNT,
                f"{key} is {str(schema[key])[:20]} in a JSON schema. It must be at most {LARGEST_COUNT:,}.",
                key,
            )


def _parsed(text: str) -> object:
    """A schema or tag that comes as text; the text itself if it is none. Raises RequestError where nesting would exhaust the parser."""
    if text.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            try:
                return json.loads(text)
            except RecursionError:
                raise RequestError("A JSON schema given as text is nested too deeply.", PLACES[1]) from None
    return text
