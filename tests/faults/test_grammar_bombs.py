"""Grammars made to hurt: whatever a client sends is refused, or compiled within bounds, and everybody else is served meanwhile."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from asking import ask, chat, refused, text
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from memdec.server.api.structured_outputs import require_effective, require_small
from memdec.server.engine.grammars import Grammars, asking
from memdec.server.engine.sandbox import SECONDS, Sandbox
from memdec.server.errors import RequestError

pytestmark = pytest.mark.slow

TEXT = {"type": "string"}


def nested(levels: int, wrap: Any, leaf: Any) -> Any:
    """A leaf wrapped so many times."""
    for _ in range(levels):
        leaf = wrap(leaf)
    return leaf


def properties(count: int, value: Any) -> dict[str, Any]:
    """A schema of an object with so many properties."""
    return {"type": "object", "properties": {f"p{i}": value for i in range(count)}}


def references(levels: int, names: tuple[str, ...]) -> dict[str, Any]:
    """A schema whose every level refers to the next once for each name."""
    levels_of = {f"d{i}": {"type": "object", "properties": {n: {"$ref": f"#/$defs/d{i + 1}"} for n in names}} for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**levels_of, f"d{levels}": TEXT}}


def tag(content: dict[str, Any]) -> dict[str, str]:
    """A structural tag around something."""
    form = {"type": "tag", "begin": "<", "content": content, "end": ">"}
    return {"structural_tag": json.dumps({"type": "structural_tag", "format": form})}


REFUSED: dict[str, dict[str, Any]] = {  # by a look at them
    "a grammar that repeats 100,000 times": {"grammar": 'root ::= ("a" | "b"){1,100000}'},
    "a grammar that repeats exactly 100,000 times": {"grammar": 'root ::= "a"{100000}'},
    "a grammar that repeats from 50,000 times": {"grammar": "root ::= [a-z]{50000,}"},
    "a lark grammar that repeats 100,000 times": {"grammar": 'start: ("a" | "b")~1..100000'},
    "a grammar of 20,000 rules": {"grammar": "\n".join(f'r{i} ::= "a" r{i + 1} | "b"' for i in range(20_000))},
    "a grammar with a text of 90,000 characters": {"grammar": f'root ::= "{"a" * 90_000}"'},
    "100,000 choices": {"choice": [str(i) for i in range(100_000)]},
    "two choices of 900 kB": {"choice": ["a" * 900_000, "b" * 900_000]},
    "1,500 choices that begin alike": {"choice": ["a" * i for i in range(1500)]},
    "an expression that repeats 100,000 times": {"regex": "[ab]{1,100000}"},
    "an expression that repeats 0100000 times": {"regex": "[ab]{0100000}"},
    "an expression of 100,000 letters": {"regex": "a?" * 50_000},
    "a pattern that repeats 100,000 times": {"json": {"type": "array", "items": {**TEXT, "pattern": "[ab]{100000}"}}},
    "a pattern of properties that repeats": {"json": {"type": "object", "patternProperties": {"^a{99999}$": TEXT}}},
    "a pattern of names that repeats": {"json": {"type": "object", "propertyNames": {"pattern": "^a{99999}$"}}},
    "a schema in text that repeats": {"json": json.dumps({**TEXT, "pattern": "[ab]{100000}"})},
    "a schema that counts to 100,000": {"json": {"type": "array", "minItems": 100_000}},
    "a schema of 1,500 references": {"json": references(1500, ("a",))},
    "a schema of 30,000 values": {"json": {"enum": list(range(30_000))}},
    "a constant of 80,000 characters": {"json": {"const": "x" * 80_000}},
    "a schema of 200 levels": {"json": nested(200, lambda s: {"type": "array", "items": s}, TEXT)},
    "a tag with a grammar that repeats": tag({"type": "grammar", "grammar": 'root ::= ("a" | "b"){1,100000}'}),
    "a tag with an expression that repeats": tag({"type": "regex", "pattern": "[ab]{1,100000}"}),
    "a tag with a schema that repeats": tag({"type": "json_schema", "json_schema": {**TEXT, "pattern": "[ab]{100000}"}}),
}
ENDED: dict[str, dict[str, Any]] = {  # by what they cost, or because nothing follows them
    "a grammar whose rules repeat repeats": {"grammar": 'root ::= b{1,300}\nb ::= c{1,300}\nc ::= d{1,300}\nd ::= "x" | "y"'},
    "an expression that repeats repeats": {"regex": "((a{1,99}){1,99}){1,99}"},
    "an expression of 6,000 options": {"regex": "a?" * 3000 + "a" * 3000},
    "a pattern of properties that repeats repeats": {"json": {"type": "object", "patternProperties": {"^(a{1,9999}){1,9999}$": TEXT}}},
    "a pattern of names that repeats repeats": {"json": {"type": "object", "propertyNames": {"pattern": "^(a{1,9999}){1,9999}$"}}},
    "50 long texts": {"json": {"type": "object", "properties": {f"p{i}": {**TEXT, "maxLength": 9000 + i} for i in range(50)}}},
    "3,000 properties": {"json": properties(3000, TEXT)},
    "500 addresses": {"json": properties(500, {**TEXT, "format": "uri"})},
    "500 texts of other lengths": {"json": {"type": "array", "prefixItems": [{**TEXT, "maxLength": 500 + i} for i in range(500)]}},
    "a tag of 500 expressions": tag({"type": "sequence", "elements": [{"type": "regex", "pattern": "[a-z]{1,5000}"}] * 500}),
    "5,000 choices of Chinese": {"choice": ["".join(chr(0x4E00 + i * j % 2000) for j in range(1, 15)) for i in range(5000)]},
    "references in a ring": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "a grammar that goes round": {"grammar": "root ::= root"},
    "20,000 parentheses": {"grammar": f'root ::= {"(" * 20_000}"a"{")" * 20_000}'},
}
BOUNDED: dict[str, dict[str, Any]] = {  # they look worse than they are, for this backend; on another they may be ended
    "an ambiguous grammar": {"grammar": 'root ::= root root | "a" | "aa" | "aaa"'},
    "a grammar of empty loops": {"grammar": 'root ::= a*\na ::= b* | c*\nb ::= a | "x"\nc ::= a | "x" | ""'},
    "rules that double": {"grammar": "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40)), 'r40 ::= "x"'])},
    "an expression with 2^20 states": {"regex": "(a|b)*a(a|b){20}"},
    "an expression that backtracks": {"regex": "(((a+)+)+)+b"},
    "a pattern with 2^25 states": {"json": {**TEXT, "pattern": "^(a|b)*a(a|b){25}$"}},
    "references that double": {"json": references(24, ("a", "b"))},
    "60 levels": {"json": nested(60, lambda s: {"type": "array", "items": s}, TEXT)},
    "alternatives that double": {"json": nested(8, lambda s: {"anyOf": [s, s]}, properties(1, TEXT))},
}
ENDS = (VLLMValidationError, GracefulHTTPError)  # the second where a busy machine left no time to find out
BOMBS = REFUSED | ENDED | BOUNDED


def test_there_are_forty() -> None:
    """Of all kinds."""
    assert len(BOMBS) >= 40
    assert {kind for spec in BOMBS.values() for kind in spec} == {"grammar", "regex", "choice", "json", "structural_tag"}


@pytest.mark.parametrize("name", BOMBS)
def test_a_look_tells_the_large_ones(name: str) -> None:
    """Wherever they stand; nothing that is only costly is refused without being tried."""
    spec = BOMBS[name]
    bodies: list[dict[str, Any]] = [{"structured_outputs": spec}]
    if isinstance(spec.get("json"), dict):
        bodies.append({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": spec["json"]}}})
        bodies.append({"tools": [{"type": "function", "function": {"name": "f", "parameters": spec["json"]}}]})
    for body in bodies:
        if name in REFUSED:
            with pytest.raises(RequestError) as refusal:
                require_small(body)
            assert refusal.value.param and len(str(refusal.value)) < 200
        else:
            require_small(body)


@pytest.fixture(scope="module")
def engine_config(toys: Path) -> Any:
    """An engine's configuration, without the engine."""
    outputs = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 20}
    return AsyncEngineArgs(model=str(toys / "base"), structured_outputs_config=outputs, **options).create_engine_config()


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One for all: it starts an interpreter."""
    started = Sandbox.start()
    yield started
    started.control.close()


@pytest.fixture(scope="module")
def grammars(engine_config: Any, sandbox: Sandbox) -> Grammars:
    """What the front end asks."""
    return Grammars(engine_config, sandbox)


def tried(grammars: Grammars, spec: dict[str, Any], who: str = "") -> StructuredOutputsParams:
    """One grammar through the sandbox, for a client of its own: nobody waits for the rest that another must take."""

    async def ask_it() -> StructuredOutputsParams:
        asking.set(who or str(spec)[:1000])
        return await grammars.checked(StructuredOutputsParams(**spec))

    return asyncio.run(ask_it())


@pytest.mark.parametrize("name", ENDED | BOUNDED)
def test_the_costly_ones_are_ended(grammars: Grammars, name: str) -> None:
    """Those that a look lets pass take at most what a compile may take, and a refusal says why."""
    if name in ENDED:
        with pytest.raises(ENDS):
            tried(grammars, BOMBS[name])
    else:
        with contextlib.suppress(*ENDS):
            tried(grammars, BOMBS[name])
    assert all(outcome.get("seconds", SECONDS) <= SECONDS + 0.1 for outcome in grammars.known.values())


def test_what_people_send_passes(grammars: Grammars) -> None:
    """As the engine wants it: choices as a grammar, and the backend that the engine has."""
    person = {**properties(5, TEXT), "required": ["p0"], "additionalProperties": False}
    for spec in (
        {"json": person},
        {"json": json.dumps(person)},
        {"json_object": True},
        {"regex": r"\d{4}-\d\d"},
        {"choice": ["yes", "no"]},
    ):
        passed = tried(grammars, spec)
        assert passed._backend == "xgrammar"
        assert (passed.grammar is not None) == ("choice" in spec)


def test_who_leaves_ends_the_compile(grammars: Grammars) -> None:
    """And what was not finished is not remembered."""

    async def leave() -> None:
        asking.set("who leaves")
        compiling = asyncio.create_task(grammars.checked(StructuredOutputsParams(**ENDED["3,000 properties"])))
        await asyncio.sleep(0.05)
        compiling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await compiling

    grammars.known.clear()
    asyncio.run(leave())
    assert not grammars.known


def test_clients_share_the_sandbox(grammars: Grammars) -> None:
    """One client's bombs wait for each other; another's grammar doesn't wait for them."""

    async def both() -> int:
        async def one(who: str, spec: dict[str, Any]) -> None:
            asking.set(who)
            await grammars.checked(StructuredOutputsParams(**spec))

        bombs = [asyncio.create_task(one("bomber", {"regex": "a?" * 3000 + "a" * (2000 + i)})) for i in range(6)]
        await asyncio.sleep(0)
        await one("other", {"regex": "[a-z]+zz"})
        waiting = sum(not bomb.done() for bomb in bombs)
        for bomb in bombs:
            bomb.cancel()
        await asyncio.gather(*bombs, return_exceptions=True)
        return waiting

    assert asyncio.run(both()) >= 4  # two may be under way at once


def test_a_sandbox_that_died_is_replaced(engine_config: Any, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next grammar."""
    ours, theirs = socket.socketpair()
    grammars = Grammars(engine_config, Sandbox(ours))
    theirs.close()
    started: list[Any] = []
    monkeypatch.setattr(Sandbox, "start", lambda: SimpleNamespace(equip=started.append, ask=sandbox.ask))
    assert tried(grammars, {"regex": "a+"}).regex == "a+"
    assert started == [engine_config]


@pytest.mark.parametrize(
    "field", [{"disable_any_whitespace": False}, {"whitespace_pattern": "[ ]?"}, {"disable_additional_properties": True}]
)
def test_options_without_effect_are_refused(field: dict[str, Any]) -> None:
    """By name; the one that says what is so anyway passes."""
    asked: dict[str, Any] = {"json": {"type": "object"}}
    with pytest.raises(RequestError) as refusal:
        require_effective({"structured_outputs": {**asked, **field}}, compact=True)
    assert refusal.value.param == next(iter(field))
    require_effective({"structured_outputs": {**asked, "disable_any_whitespace": True}}, compact=True)
    require_effective({"structured_outputs": {**asked, "disable_any_whitespace": False}}, compact=False)
    require_effective({"structured_outputs": {**asked, "disable_any_whitespace": None}, "prompt": "x"}, compact=True)


def test_bombs_over_http(http: httpx.Client) -> None:
    """All at once, plain and streamed: each is an error in OpenAI's form, and what others ask is answered."""
    names = ["a grammar that repeats 100,000 times", *list(ENDED)[1:4], "a tag of 500 expressions"]
    with ThreadPoolExecutor(len(names) + 1) as crowd:
        answers = [crowd.submit(ask, http, structured_outputs=BOMBS[name], stream=i % 2 > 0) for i, name in enumerate(names)]
        schema = {"name": "x", "schema": ENDED["a pattern of names that repeats repeats"]["json"]}
        answers.append(crowd.submit(chat, http, response_format={"type": "json_schema", "json_schema": schema}))
        assert http.get("/health").status_code == 200
        assert text(ask(http, domain="a", max_tokens=2)) is not None
        for answer in answers:
            refused(answer.result(), answer.result().status_code)
            assert answer.result().status_code in (400, 503)  # the second where a busy machine left no time to find out
    assert text(ask(http, structured_outputs={"choice": ["yes", "no"]}, max_tokens=20)) in ("yes", "no")


def test_compact_json_ends(http: httpx.Client) -> None:
    """At temperature 0 a schema of few values is followed to its end; white space stands nowhere that a model could stay."""
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for domain in (None, "a"):
        answer = ask(http, domain=domain, max_tokens=100, structured_outputs={"json": schema, "disable_any_whitespace": True})
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert json.loads(text(answer))["b"] == "x"
    refused(ask(http, structured_outputs={"json": schema, "disable_any_whitespace": False}), 400, "disable_any_whitespace")
