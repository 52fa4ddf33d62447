"""A field that would do nothing is refused by name: written twice, no number, of an older API, misspelt; and with --strict-fields, unknown."""

import json
from typing import Any

import httpx
import pytest
from asking import BASE, CHAT, COMPLETIONS, ask, chat, refused, text

from memdec.server.api.body import ChatCompletion, Completion
from memdec.server.api.fields import GONE, require_effective
from memdec.server.api.limits import Limits
from memdec.server.api.plain_json import require_plain
from memdec.server.errors import RequestError
from memdec.server.launch.options import parse
from memdec.server.routing.spelling import NAMES, meant, require_spelt_fields, require_spelt_headers

pytestmark = pytest.mark.engine

JSON = {"Content-Type": "application/json"}


def blamed(text: str | bytes) -> str | None:
    """The parameter that a body is refused for; None if it isn't."""
    try:
        require_plain(text.encode() if isinstance(text, str) else text)
    except RequestError as error:
        return error.param
    return None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"domain": "a", "domain": "b"}', "domain"),
        ('{"a": 1, "b": 2, "a": 1}', "a"),
        ('{"response_format": {"json_schema": {"name": "x", "name": "x"}}}', "name"),
        ('{"messages": [{"role": "user", "role": "system"}]}', "role"),
        ('{"logit_bias": {"5": NaN}}', "logit_bias"),
        ('{"logit_bias": {"5": Infinity}}', "logit_bias"),
        ('{"lambda": -Infinity}', "lambda"),
        ('{"length_penalty": 1e999}', "length_penalty"),
        ('{"vllm_xargs": {"x": [1, -1E+400]}}', "vllm_xargs"),
        ('{"seed": 99999999999999999999}', "seed"),
        ('{"a": 1' + "0" * 400 + ".0}", "a"),
        ('{"logit_bias": {"5": NaN}}'.encode("utf-16"), "logit_bias"),
        ('{"domain": "a", "domain": "b"}'.encode("utf-8-sig"), "domain"),
    ],
    ids=str,
)
def test_json_that_nobody_could_act_on(body: str | bytes, param: str) -> None:
    """Refused by the name of the key, at any depth and in any encoding that JSON may have."""
    assert blamed(body) == param


@pytest.mark.parametrize(
    "body", ['{"prompt": "NaN 1e999 Infinity"}', '{"a": {"x": 1}, "b": {"x": 1}}', '{"a": 1e300, "b": -1E-400}', '{"seed": 9223372036854775807}', "[1, NaN]"]
)  # fmt: skip
def test_json_that_is_plain(body: str) -> None:
    """Words in a text, equal names in different objects, numbers at the edge."""
    assert blamed(body) is None


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *((name, "domain") for name in ("domian", "Domain", "domains", "doman", "X-Domain", "domain_name")),
        *((name, "lambda") for name in ("lamda", "LAMBDA", "lambda_", "lamdba", "lam", "λ")),
        *((name, "memory") for name in ("memroy", "momery", "memory_mode", "Memory")),
        *((name, "rag_stride") for name in ("ragstride", "rag-stride", "stride")),
        *(
            (name, None)
            for name in (*NAMES, "metadata", "store", "user", "service_tier", "modalities", "verbosity", "stop", "top_a", "", "日本")
        ),
    ],
)
def test_misspelt_names(name: str, ours: str | None) -> None:
    """What is near one of ours means it; other APIs' fields don't."""
    assert meant(name) == ours
    if ours:
        with pytest.raises(RequestError, match=ours) as caught:
            require_spelt_fields(["metadata", name])
        assert caught.value.param == name


def test_names_of_headers() -> None:
    """The right ones, and what gateways add, pass; a letter missing or too much does not."""
    require_spelt_headers(
        ["X-Domain", "x-lambda", "X-Memory", "X-Request-Id", "X-Forwarded-For", "X-Domain-Id", "X-Amzn-Trace-Id", "domian"]
    )
    for name in ("X-Domian", "x-domains", "X-Lamda", "X-Memroy"):
        with pytest.raises(RequestError, match="Did you mean 'X-"):
            require_spelt_headers([name])


def test_too_many_unknown_names() -> None:
    """Comparing takes time, so there is an end to it."""
    with pytest.raises(RequestError, match="over 64 fields"):
        require_spelt_fields(f"z{i}" for i in range(100_000))


def param_of(request: Any, strict: bool = False) -> str | None:
    """The parameter that a parsed request is refused for."""
    try:
        require_effective(request, strict)
    except RequestError as error:
        return error.param
    return None


def test_old_names() -> None:
    """Each says what took its place; null, and what asks for nothing, pass."""
    for name, instead in GONE.items():
        with pytest.raises(RequestError) as caught:
            require_effective(Completion(prompt="x", **{name: {"a": 1}}), False)
        assert caught.value.param == name and instead in str(caught.value)
        assert param_of(Completion(prompt="x", **{name: None})) is None
    assert param_of(Completion(prompt="x", best_of=1)) is param_of(Completion(prompt="x", n=3, best_of=3)) is None
    assert param_of(Completion(prompt="x", n=2, best_of=3)) == "best_of"
    assert param_of(Completion(prompt="x", length_penalty=2.0)) == "length_penalty"
    assert param_of(Completion(prompt="x", length_penalty=2.0, use_beam_search=True)) is None


def test_strict_fields() -> None:
    """Everything that vLLM or we know passes; whatever else is named, in inner objects too."""
    messages = [{"role": "user", "content": "x", "name": "y", "anything": 1}]
    known = {"domain": "a", "lambda": 0.5, "memory": "rag", "rag_stride": 4, "stream_options": {"include_usage": True}}
    assert param_of(ChatCompletion(messages=messages, stream=True, **known), strict=True) is None
    assert param_of(ChatCompletion(messages=messages, metadata={}), strict=True) == "metadata"
    assert param_of(ChatCompletion(messages=messages, metadata={})) is None
    inner = {"stream": True, "stream_options": {"include_usge": True}}
    assert param_of(ChatCompletion(messages=messages, **inner), strict=True) == "stream_options.include_usge"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"domian": 1}, "stirct": True}}]
    assert param_of(ChatCompletion(messages=messages, tools=tools), strict=True) == "tools.function.stirct"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"domian": "a", "lamda": 0.3}, "domian"),
        ({"domain": "a", "lamda": 0.3}, "lamda"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"best_of": 4}, "best_of"),
        ({"domain": "a", "memory": "none", "lam": 0.5}, "lambda"),
        ({"vllm_xargs": {"domian": "a"}}, "domian"),
        ({"extra_body": {"domain": "a"}}, "extra_body"),
    ],
)
def test_over_http(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    """Completions and chats alike, plain and streamed; a field that nobody knows is ignored, as in vLLM."""
    for stream in (False, True):
        refused(ask(http, **fields, stream=stream), 400, param)
        refused(chat(http, **{"lambda" if k == "lam" else k: v for k, v in fields.items()}, stream=stream), 400, param)
    assert text(ask(http, nonsense=True, metadata={"domain": "a"})) == text(ask(http))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_plain_json_over_http(http: httpx.Client, path: str) -> None:
    """On every route that reads a body."""
    for spelt, param in (('"model": "base"', "model"), ('"logit_bias": {"5": NaN}', "logit_bias"), ('"x": {"a": 1, "a": 2}', "a")):
        body = f"{{{spelt}, {json.dumps(BASE)[1:]}"
        refused(http.post(path, content=body, headers=JSON), 400, param)
    refused(http.post(path, json=BASE, headers={"X-Domian": "a"}), 400, "x-domian")


def test_the_switch_reaches_the_routes() -> None:
    """It is one of the limits that routes read."""
    assert not Limits().strict_fields
    assert parse(["model", "--strict-fields"]).limits.strict_fields
