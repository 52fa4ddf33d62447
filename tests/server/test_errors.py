"""Whatever a client sends, the answer is an error in OpenAI's form, never a 5xx, and the server goes on."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from asking import BASE, CHAT, COMPLETIONS, ask, chat, refused, text
from tools import needs

pytestmark = pytest.mark.engine

JSON = {"Content-Type": "application/json"}
BODY_LIMIT = 100_000


@pytest.fixture(autouse=True)
def still_answers(http: httpx.Client) -> Iterator[None]:
    """After every test the server does its work."""
    yield
    assert text(ask(http, domain="a", max_tokens=1)) is not None


def spelled(fields: str) -> bytes:
    """A request's body with these fields, spelled as JSON, in front."""
    return f"{{{fields}, {json.dumps(BASE)[1:]}".encode()


@pytest.mark.parametrize("lam", ["-0.1", "1.1", "NaN", "Infinity", "1e999", '"0.5"', "true", "[]", "{}", "1" + "0" * 400, '"\\u0000"'])
def test_bad_lambda(http: httpx.Client, lam: str) -> None:
    """Anything but a number from 0 to 1."""
    refused(http.post(COMPLETIONS, content=spelled(f'"domain": "a", "lambda": {lam}'), headers=JSON), 400, "lambda")


@pytest.mark.parametrize("lam", ["abc", "nan", "inf", "-0.1", "1.1", ""])
def test_bad_lambda_header(http: httpx.Client, lam: str) -> None:
    """The same in the header."""
    refused(ask(http, {"X-Lambda": lam}, domain="a"), 400, "lambda")


@pytest.mark.parametrize("domain", [5, [], {}, True, ["a"]])
def test_domain_of_a_wrong_type(http: httpx.Client, domain: Any) -> None:
    """A domain is a string."""
    refused(ask(http, domain=domain), 400, "domain")
    refused(chat(http, domain=domain), 400, "domain")


@pytest.mark.parametrize("domain", ["law", "", "A", "a ", "a\0", "x" * 50_000, "ä", "../a", "{a}"])
def test_unknown_domain(http: httpx.Client, domain: str) -> None:
    """A 404 that lists the valid names, short however long the wrong one was; by alias too."""
    for answer in (ask(http, domain=domain), ask(http, model=f"base:{domain}"), chat(http, domain=domain)):
        message = refused(answer, 404, "domain")
        assert "Valid domains: a, b." in message and len(message) < 300


def test_unknown_domain_header(http: httpx.Client) -> None:
    """The same in the header, which may hold any byte."""
    for domain in (b"law", b"a, b", b"\xff\xfe"):
        assert "a, b" in refused(http.post(COMPLETIONS, json=BASE, headers=[(b"X-Domain", domain)]), 404, "domain")


def test_unknown_model(http: httpx.Client) -> None:
    """A model that isn't ours."""
    for model in ("nope", "a", "base2"):
        assert "base:a" in refused(ask(http, model=model), 404, "model")


@pytest.mark.parametrize(
    ("headers", "fields", "param"),
    [
        ({"X-Domain": "b"}, {"domain": "a"}, "domain"),
        ({"X-Domain": "b"}, {"model": "base:a"}, "domain"),
        ({}, {"domain": "b", "model": "base:a"}, "domain"),
        ({"X-Lambda": "0.4"}, {"domain": "a", "lam": 0.5}, "lambda"),
        ({"X-Memory": "none"}, {"domain": "a", "memory": "decoder"}, "memory"),
        ({}, {"lam": 0.5}, "lambda"),
        ({"X-Lambda": "0.5"}, {}, "lambda"),
        ({}, {"memory": "decoder"}, "memory"),
        ({}, {"domain": "a", "memory": "brain"}, "memory"),
        ({}, {"domain": "a", "memory": 5}, "memory"),
        ({"X-Memory": "brain"}, {"domain": "a"}, "memory"),
        ({}, {"vllm_xargs": {"domain": "a"}}, "vllm_xargs"),
        ({}, {"vllm_xargs": {"lambda": 0.5}, "domain": "a"}, "vllm_xargs"),
    ],
)
def test_contradictions(http: httpx.Client, headers: dict[str, str], fields: dict[str, Any], param: str) -> None:
    """Sources that disagree, and fields that mean nothing alone or are reserved."""
    refused(ask(http, headers, **fields), 400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{nope",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        json.dumps(BASE).encode()[:-5],
        b'{"model": "base", "prompt": "\xff\xfe"}',
        b"\x00" * 50,
        b"[" * 2000 + b"]" * 2000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b"[" * 90_000,
        spelled('"domain": ' + "[" * 2000 + "]" * 2000),
        spelled('"other": ' + '{"a":' * 2000 + "1" + "}" * 2000),
        spelled('"lambda": 1' + "0" * 5000),
    ],
    ids=lambda body: repr(body[:16]),
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_bodies_that_are_no_request(http: httpx.Client, path: str, body: bytes) -> None:
    """Not JSON, cut short, not UTF-8, nested beyond reason."""
    refused(http.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    "field",
    ["prompt", "model", "domain", "stop", "memory", "lambda", "user", "request_id", "bad_words", "suffix", "cache_salt", "vllm_xargs"],
)
def test_half_surrogates(http: httpx.Client, field: str) -> None:
    """Valid JSON that is no text in UTF-8, wherever it stands."""
    value: Any = {"bad_words": ["\ud800"], "vllm_xargs": {"x": "\udfff"}}.get(field, "x\ud800")
    body = json.dumps({**BASE, "domain": "a", "model": "base", field: value}).encode()
    assert refused(http.post(COMPLETIONS, content=body, headers=JSON), 400)
    whole = json.dumps({**BASE, "prompt": "\U0001d11e \\ud800"}).encode()  # a whole pair, and a backslash
    assert http.post(COMPLETIONS, content=whole, headers=JSON).status_code == 200


def test_content_types(http: httpx.Client) -> None:
    """Only JSON is read, whatever else the body is called."""
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml"):
        refused(http.post(COMPLETIONS, content=json.dumps(BASE), headers={"Content-Type": kind, "X-Domain": "a"}), 400)
    answer = http.post(COMPLETIONS, content=json.dumps(BASE), headers={"Content-Type": "application/json; charset=utf-8"})
    assert answer.status_code == 200


def test_paths_and_methods(http: httpx.Client) -> None:
    """What isn't there, and what can't be done with what is."""
    for method, path in (
        ("GET", "/nope"),
        ("POST", "/v1/nope"),
        ("POST", "/v1/nope/"),
        ("GET", "/v1"),
        ("POST", "/v1/embeddings"),
        ("GET", "/%00"),
    ):
        refused(http.request(method, path), 404, None)
    for method, path in (("GET", COMPLETIONS), ("DELETE", "/v1/models"), ("PUT", "/v1/domains"), ("POST", "/health"), ("PATCH", CHAT)):
        refused(http.request(method, path), 405, None)


def pieces(size: int) -> Iterator[bytes]:
    """A body in chunks, which httpx sends without a content-length."""
    yield b'{"model": "base", "prompt": "'
    yield b"x" * size
    yield b'"}'


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_body_limit(http: httpx.Client, path: str) -> None:
    """Over the limit is a 413, with a content-length and without."""
    assert "100,000 bytes" in refused(http.post(path, content=b"".join(pieces(BODY_LIMIT)), headers=JSON), 413)
    refused(http.post(path, content=pieces(BODY_LIMIT), headers=JSON), 413)
    below = http.post(path, content=b"".join(pieces(BODY_LIMIT - 1000)), headers=JSON)
    assert below.status_code == (200 if path == "/tokenize" else 400)  # the prompt is over the context, which is no matter there


@needs("curl", "Debian: apt install curl")
def test_body_limit_with_curl(http: httpx.Client) -> None:
    """Curl asks first (100-continue) or sends chunks; both get the 413."""
    for extra in ("Expect: 100-continue", "Transfer-Encoding: chunked"):
        command = ["curl", "-sS", "--max-time", "120", "-H", "Content-Type: application/json"]
        command += ["-H", extra, "--data-binary", "@-", str(http.base_url.join(COMPLETIONS))]
        done = subprocess.run(command, check=True, capture_output=True, input=b"x" * (BODY_LIMIT + 1))
        assert json.loads(done.stdout)["error"]["code"] == 413


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "x " * 2000},
        {"prompt": [5] * 513},
        {"prompt": [[5] * 20, [5] * 600]},
        {"prompt": None},
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": 5},
        {"prompt": [-1]},
        {"prompt": [99_999]},
        {"prompt": [10**30]},
        {"prompt": None, "prompt_embeds": "AAAA"},
        {"max_tokens": 100_000},
        {"max_tokens": 10**30},
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"n": 0},
        {"n": -1},
        {"n": 10**9},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 2},
        {"top_k": -5},
        {"min_p": float("nan")},
        {"presence_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"logprobs": 100},
        {"logprobs": -5},
        {"logit_bias": {"99999": 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": []},
        {"stop": ""},
        {"stop": ["x"] * 1000},
        {"stop": 5},
        {"stop_token_ids": [10**25]},
        {"allowed_token_ids": [99_999]},
        {"bad_words": [""]},
        {"seed": 10**30},
        {"cache_salt": "a/b"},
        {"cache_salt": "x" * 200},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {"regex": "((("}},
        {"vllm_xargs": 5},
        {"vllm_xargs": {"a": {"b": 1}}},
        {"suffix": "x"},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_parameters_out_of_range(http: httpx.Client, fields: dict[str, Any]) -> None:
    """Prompts over the context, and every other parameter that can't be."""
    refused(http.post(COMPLETIONS, content=json.dumps({**BASE, "domain": "a", **fields}), headers=JSON), 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": None},
        {"messages": "hello"},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": "x " * 2000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]},
        {"max_tokens": 100_000},
        {"max_completion_tokens": -1},
        {"chat_template": "{{ 1/0 }}"},
        {"top_logprobs": 5},
        {"use_beam_search": True},
        {"vllm_xargs": {"domain": "a"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_chat_parameters(http: httpx.Client, fields: dict[str, Any]) -> None:
    """The same for chats."""
    refused(chat(http, domain="a", **fields), 400)


def test_answers_end_at_the_context(http: httpx.Client) -> None:
    """A prompt that fits, with a max_tokens that fits only alone: the answer is as long as there is room."""
    answer = ask(http, domain="a", prompt="x " * 240, max_tokens=500, ignore_eos=True).json()
    assert answer["usage"]["total_tokens"] == 512 and answer["choices"][0]["finish_reason"] == "length"


def test_detokenize_parameters(http: httpx.Client) -> None:
    """Ids that are none."""
    for tokens in ([-1], [10**20], [2**40], ["x"], 5, None):
        refused(http.post("/detokenize", json={"model": "base", "tokens": tokens}), 400)
