"""Whatever bytes arrive: never a 5xx, never a traceback, never a hang, and the next request is answered."""

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
import schemathesis
from asking import BASE, CHAT, COMPLETIONS, PROMPT, ask, refused, text
from conftest import ROOT, Server
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.engine

JSON = {"Content-Type": "application/json"}
MESSAGES = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
HUGE = "9" * 400


@pytest.fixture(autouse=True)
def unharmed(server: Server, http: httpx.Client) -> Iterator[None]:
    """Afterwards nothing has been logged as an error, and the server does its work."""
    logged = len(server.text())
    yield
    assert text(ask(http, domain="a", max_tokens=1)) is not None
    assert "Traceback" not in server.text()[logged:]


def fields(**values: Any) -> bytes:
    """A completion's body with other fields."""
    return json.dumps({**BASE, "max_tokens": 2, "domain": "a", **values}).encode()


def spelled(name: str, value: str) -> bytes:
    """A completion's body with one more field, in JSON's own spelling."""
    others = {**BASE, "max_tokens": 2, "domain": "a"}
    others.pop(name, None)
    return f'{{"{name}": {value}, {json.dumps(others)[1:]}'.encode()


CORPUS = {
    **{f"cut at {n}": fields()[:n] for n in (1, 2, 9, 30, len(fields()) - 1)},
    **{f"{name} huge": spelled(name, HUGE) for name in ("max_tokens", "n", "seed", "top_k", "min_tokens", "stream_interval", "priority", "logprobs", "rag_stride")},
    **{f"{name} beyond 64 bits": spelled(name, f"-{1 << 64}") for name in ("seed", "top_k", "stop_token_ids", "allowed_token_ids", "truncate_prompt_tokens")},
    **{f"{name} NaN": spelled(name, "NaN") for name in ("temperature", "top_p", "frequency_penalty", "lambda", "max_tokens", "length_penalty", "n")},
    **{f"{name} 1e999": spelled(name, "-1e999") for name in ("temperature", "min_p", "repetition_penalty", "lambda")},
    **{f"structured_outputs {value}": spelled("structured_outputs", value) for value in ("true", "1", '"x"', "[]", "[null]", "{}", '{"json": 5}', '{"choice": []}', '{"choice": [5]}')},
    **{f"response_format {value}": spelled("response_format", value) for value in ("1", "[]", '{"type": 5}', '{"type": "json_schema", "json_schema": 5}', '{"type": "json_schema", "json_schema": {"name": 5, "schema": []}}', '{"type": "structural_tag"}')},
    **{f"stream_options {value}": spelled("stream_options", value) for value in ("1", "[]", '{"include_usage": 5}')},
    **{f"logit_bias {value}": spelled("logit_bias", value) for value in (f'{{"{HUGE}": 1}}', f'{{"1": {HUGE}}}', '{"1": "x"}', '{"": 1}', '{"-1": 1}')},
    **{f"vllm_xargs {value}": spelled("vllm_xargs", value) for value in (f'{{"a": {HUGE}}}', '{"a": [[]]}', '{"rag_segment": 1}', '{"": null}')},
    "NUL in the domain": spelled("domain", '"a\\u0000"'),
    "line breaks in the domain": spelled("domain", '"a\\r\\nX-Injected: yes"'),
    "NUL in the prompt": fields(prompt="\0" * 20),
    "NUL in the model": fields(model="base:\0a"),
    "NUL in the request id": fields(request_id="\0\r\n"),
    "a byte order mark": b"\xef\xbb\xbf" + fields(),
    "UTF-16": fields().decode().encode("utf-16"),
    "overlong UTF-8": fields().replace(b"def read", b"\xc0\xaf"),
    "lone continuation": fields().replace(b"def read", b"\x80\x80"),
    "the same key twice": fields().replace(b'"max_tokens": 2', b'"max_tokens": 2, "domain": "b"'),
    "brackets in the prompt": fields(prompt=[[[[PROMPT]]]]),
    "2,000 brackets as prompt": spelled("prompt", "[" * 2000 + "]" * 2000),
    "2,000 objects in vllm_xargs": spelled("vllm_xargs", '{"a":' * 2000 + "1" + "}" * 2000),
    "2,000 brackets in a schema as text": fields(structured_outputs={"json": "[" * 2000 + "]" * 2000}),
    "2,000 parentheses in a regex": fields(structured_outputs={"regex": "(" * 2000 + ")" * 2000}),
    "a regex that repeats repeats": fields(structured_outputs={"regex": "((a{1,99}){1,99}){1,99}"}),
    "a grammar that goes round": fields(structured_outputs={"grammar": "root ::= root"}),
    "a schema that refers to itself": fields(structured_outputs={"json": {"$ref": "#"}}),
    "a schema elsewhere": fields(structured_outputs={"json": {"$ref": "http://127.0.0.1:1/x.json"}}),
    "a pattern that backtracks": fields(structured_outputs={"json": {"type": "string", "pattern": "^(a+)+$"}}),
    "5,000 choices": fields(structured_outputs={"choice": [str(i) for i in range(5000)]}),
    "every token's bias": fields(logit_bias={str(i): 100 for i in range(1000)}),
    "1,000 stop tokens": fields(stop_token_ids=list(range(1000))),
    "a prompt of mixed kinds": fields(prompt=["x", 5, None]),
    "5,000 empty prompts": fields(prompt=[""] * 5000),
}  # fmt: skip
ANSWERED = {  # what is odd but no mistake
    "NUL in the prompt", "NUL in the request id", "every token's bias", "1,000 stop tokens", "5,000 choices",
    "a pattern that backtracks", "a schema elsewhere", "a byte order mark", "UTF-16", 'vllm_xargs {"": null}',
}  # fmt: skip


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(http: httpx.Client, name: str) -> None:
    """Plain and streamed: an error in OpenAI's form, or an answer, within seconds."""
    body = CORPUS[name]
    streamed = body[:-1] + b', "stream": true}' if body.endswith(b"}") else body
    for content in (body, streamed):
        began = time.monotonic()
        answer = http.post(COMPLETIONS, content=content, headers=JSON)
        assert time.monotonic() - began < 30
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            refused(answer, answer.status_code)
            assert answer.status_code in (400, 404)
        else:
            assert name in ANSWERED, answer.text[:300]
    assert "x-injected" not in answer.headers


CHATS: dict[str, dict[str, Any]] = {
    "a message of no kind": {"messages": [5]},
    "no role": {"messages": [{"content": "x"}]},
    "a role of objects": {"messages": [{"role": {"a": 1}, "content": "x"}]},
    "content of no type": {"messages": [{"role": "user", "content": [{"type": "nonsense"}]}]},
    "tool calls of no form": {"messages": [{"role": "assistant", "tool_calls": [5]}]},
    "tool calls that are none": {"messages": [{"role": "assistant", "tool_calls": "x"}]},
    "tool calls without a function": {"messages": [{"role": "assistant", "tool_calls": [{"id": "x", "type": "function"}]}]},
    "arguments that are no JSON": {"messages": [{"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
    "a file of the server's": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
    "a template of the client's": {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
    "template arguments": {"chat_template_kwargs": {"messages": 5, "tools": 5}},
    "tools of no form": {"tools": [5]},
    "a tool choice of no form": {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"function": 5}},
    "documents of no form": {"documents": 5},
    "2,000 messages": {"messages": [{"role": "user", "content": ""}] * 2000},
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats(http: httpx.Client, name: str) -> None:
    """Chats' own ways to go wrong."""
    for stream in (False, True):
        answer = http.post(CHAT, json={**MESSAGES, **CHATS[name], "stream": stream})
        assert answer.status_code == 200 or (refused(answer, answer.status_code) and answer.status_code in (400, 404)), answer.text


def sent(server: Server, data: bytes) -> bytes:
    """What the server answers to raw bytes until it closes, or b'' if it closes without a word."""
    host, port = server.url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(data)
            while piece := connection.recv(1 << 16):
                found += piece
        except ConnectionError:
            pass
    return found


REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(fields())
RAW = {
    "NUL in a header": (REQUEST + LENGTH + b"X-Domain: a\0b\r\n\r\n" + fields(), b" 400 "),
    "a header in two lines": (REQUEST + LENGTH + b"X-Domain: a\r\n b\r\n\r\n" + fields(), b" 400 "),
    "a header that would inject another": (REQUEST + LENGTH + b"X-Domain: a%0d%0aX-Injected: yes\r\n\r\n" + fields(), b" 400 "),
    "two lengths": (REQUEST + LENGTH + b"Content-Length: 3\r\n\r\n" + fields(), b" 400 "),
    "a length and chunks": (REQUEST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + fields(), b" 400 "),
    "a negative length": (REQUEST + b"Content-Length: -5\r\n\r\n" + fields(), b" 400 "),
    "a huge length": (REQUEST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n" + fields(), b" 400 "),
    "a chunk of no size": (REQUEST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + fields(), b" 400 "),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b" 400 "),
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b" 400 "),
    "a rank there isn't": (REQUEST + LENGTH + b"X-data-parallel-rank: 99\r\n\r\n" + fields(), b" 400 "),
    "a priority beyond 64 bits": (REQUEST + LENGTH + b"X-Vllm-Priority: " + b"9" * 30 + b"\r\n\r\n" + fields(), b" 400 "),
    "a trace that is none": (REQUEST + LENGTH + b"traceparent: \xff\r\n\r\n" + fields(), b" 200 "),
    "20,000 headers": (REQUEST + LENGTH + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n" + fields(), b" 431 "),
    "a header of 100 KB": (REQUEST + LENGTH + b"X-Y: " + b"y" * 100_000 + b"\r\n\r\n" + fields(), b" 431 "),
    "a websocket": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n", b" 200 "),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_raw_requests(server: Server, name: str) -> None:
    """Below what an HTTP client would send."""
    data, status = RAW[name]
    answer = sent(server, data)
    assert status in answer.split(b"\r\n")[0], answer[:300]
    assert b"x-injected" not in answer.lower().split(b"\r\n\r\n")[0]


def test_a_header_without_end(server: Server) -> None:
    """Cut off long before it has filled the memory."""
    assert len(sent(server, REQUEST + b"X-Y: " + b"y" * (20 << 20))) < 1000


def operations(server: Server) -> list[Any]:
    """Everything that the server's own description says it can do."""
    return [cast(Any, found).ok() for found in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations()]


def test_what_the_description_allows(server: Server) -> None:
    """Requests made up from the OpenAPI description, with a model that exists and short answers, so that they get further than that."""
    tried: Counter[str] = Counter()
    for operation in operations(server):

        @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy())
        def one(case: Any) -> None:
            if isinstance(case.body, dict):
                case.body.update({"model": "base", "max_tokens": 2} | ({"max_completion_tokens": 2} if "chat" in case.path else {}))
            answer = case.call(timeout=60)
            tried[case.path] += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code >= 400:
                assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

        one()
    assert len(tried) > 10 and tried[COMPLETIONS] >= 10 and tried[CHAT] >= 10


QUOTED = "/a" * 40_000  # on which vLLM's own search for paths takes minutes


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x", "model": QUOTED}),
        ("/detokenize", {"tokens": [5], "model": QUOTED}),
        (COMPLETIONS, {**BASE, "model": QUOTED}),
        (COMPLETIONS, {**BASE, "domain": QUOTED}),
        (COMPLETIONS, {**BASE, "stop_token_ids": [QUOTED]}),
        (COMPLETIONS, {**BASE, "logit_bias": {QUOTED: 1}}),
        (COMPLETIONS, {**BASE, "stop_token_ids": list(range(12_000))}),
        (CHAT, {**MESSAGES, "messages": [{"role": QUOTED, "content": "x"}]}),
        (CHAT, {**MESSAGES, "messages": [5] * 11_000}),
        (CHAT, {**MESSAGES, "messages": [{}] * 2_049}),
    ],
)
def test_what_errors_quote_is_short(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """2 KiB at most, and made at once."""
    answer = http.post(path, json=body)
    refused(answer, answer.status_code)
    assert answer.status_code in (400, 404) and len(answer.content) <= 2048


def test_tokenising_in_threads(http: httpx.Client) -> None:
    """Texts, chats and ids come back as they should, and wrong ones are still refused in the form of all errors."""
    found = http.post("/tokenize", json={"model": "base", "prompt": PROMPT * 2000, "return_token_strs": True}).json()
    assert len(found["tokens"]) == len(found["token_strs"]) == found["count"] > 2000
    assert http.post("/detokenize", json={"model": "base", "tokens": found["tokens"]}).json()["prompt"] == PROMPT * 2000
    assert http.post("/tokenize", json={"model": "base", "messages": MESSAGES["messages"]}).json()["count"] > 0
    refused(http.post("/tokenize", json={"model": "nope", "prompt": "x"}), 404)
    refused(http.post("/detokenize", json={"model": "base", "tokens": [1 << 40]}), 400)


def test_the_attacks(server: Server) -> None:
    """Those of the script that take little time; it ends with nothing lost."""
    names = ["endless_trailers", "trailers_as_headers", "bodies_over_the_limit", "pipelined_requests", "websockets"]
    script = [sys.executable, str(ROOT / "loadtest" / "attacks.py"), server.url, "--slowest-health", "60", "--only", *names]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200)
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and told["lost"] == 0 and len(told["attacks"]) == len(names), done.stdout + done.stderr
