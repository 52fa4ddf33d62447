"""`--structured-outputs-config`, whichever way it is spelled, with our defaults where the user has not decided."""

import json
from collections.abc import Sequence
from pathlib import Path

from memdec.server.json_types import JsonObject

OPTION = "--structured-outputs-config"
COMPACT = ("xgrammar", "guidance")  # backends that can do without free white space


def with_defaults(words: Sequence[str]) -> list[str]:
    """The command line with backend xgrammar and JSON without free white space, which a model at temperature 0 may write without end.

    vLLM compares the two while it parses, before a backend could be filled in. Its own default, `auto`, chooses a backend by request in the
    front end and once in the engine: what the one accepts could fail in the other. A configuration file that names the option decides alone.
    """
    rest, given = _taken_out(list(words))
    if given is None or ("--config" in words and "structured" in _file(words)):
        return list(words)
    if given.get("backend", "auto") == "auto":
        given["backend"] = "xgrammar"
    if given["backend"] in COMPACT:
        given.setdefault("disable_any_whitespace", True)
    return [*rest, f"{OPTION}={json.dumps(given)}"]


def _taken_out(words: list[str]) -> tuple[list[str], JsonObject | None]:
    """The other words, and the value that the option's words make together; None if that is no JSON, which vLLM then refuses."""
    rest: list[str] = []
    given: JsonObject = {}
    while words:
        name, equals, value = words[0].partition("=")
        name, dot, key = name.partition(".")
        if name.replace("_", "-") != OPTION:
            rest.append(words.pop(0))
            continue
        del words[0]
        if not equals:
            value = words.pop(0) if words else ""
        try:
            config = json.loads(value)
        except ValueError:
            if not dot:
                return rest, None
            config = value
        if not dot and not isinstance(config, dict):
            return rest, None
        given |= {key.replace("-", "_"): config} if dot else config
    return rest, given


def _file(words: Sequence[str]) -> str:
    """The text of the configuration file that a command line names."""
    name = words[list(words).index("--config") + 1 :][:1]
    return Path(name[0]).read_text() if name and Path(name[0]).is_file() else ""
