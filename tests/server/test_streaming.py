"""Streamed answers: the same text as plain ones, and errors that are HTTP errors."""

import json
import socket
from typing import Any

import httpx
import pytest
from asking import BASE, CHAT, COMPLETIONS, ask, chat, memory, refused
from openai import OpenAI

pytestmark = pytest.mark.engine

WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events without the last, which must be [DONE]."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    *found, done, end = response.text.split("\n\n")
    assert done == "data: [DONE]" and end == ""
    return [json.loads(event.removeprefix("data: ")) for event in found]


@pytest.mark.parametrize("choice", [{}, {"domain": "a"}, {"model": "base:b"}, {"domain": "a", "lam": 0.3}, {"domain": "b", "lam": 0}])
def test_streamed_is_plain(http: httpx.Client, choice: dict[str, Any]) -> None:
    """Text, log-probabilities, token count, model and headers, streamed and not."""
    wanted: dict[str, Any] = {**choice, "max_tokens": 12, "logprobs": 1}
    plain, streamed = ask(http, **wanted), ask(http, **wanted, **WITH_USAGE)
    *parts, last = events(streamed)
    first = plain.json()["choices"][0]
    assert "".join(p["choices"][0]["text"] for p in parts) == first["text"]
    assert [v for p in parts for v in p["choices"][0]["logprobs"]["token_logprobs"]] == first["logprobs"]["token_logprobs"]
    assert parts[-1]["choices"][0]["finish_reason"] == first["finish_reason"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == plain.json()["usage"]["completion_tokens"] == 12
    assert {p["model"] for p in [*parts, last]} == {plain.json()["model"]} == {choice.get("model", "base")}
    assert memory(streamed) == memory(plain)


def test_several_choices(http: httpx.Client) -> None:
    """With n > 1 every choice's parts add up to the plain choice."""
    wanted: dict[str, Any] = {"domain": "a", "n": 3, "seed": 7, "temperature": 1}
    texts = [""] * 3
    for part in events(ask(http, **wanted, stream=True)):
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == [c["text"] for c in sorted(ask(http, **wanted).json()["choices"], key=lambda c: c["index"])]


@pytest.mark.parametrize("model", ["base", "base:a"])
def test_chat(sdk: OpenAI, model: str) -> None:
    """The SDK's chat stream says what the plain chat says."""
    wanted: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
    plain = sdk.chat.completions.create(**wanted)
    chunks = list(sdk.chat.completions.create(**wanted, **WITH_USAGE))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens == 8
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {c.model for c in chunks} == {plain.model} == {model}


REFUSALS: list[tuple[int, dict[str, Any]]] = [
    (404, {"domain": "law"}),
    (404, {"model": "base:law"}),
    (404, {"model": "nope"}),
    (400, {"domain": "a", "lambda": 2}),
    (400, {"lambda": 0.5}),
    (400, {"domain": "b", "memory": "rag"}),
    (400, {"domain": "a", "memory": "rag", "rag_stride": 4, "min_tokens": 2}),
    (400, {"domain": "a", "use_beam_search": True}),
    (400, {"domain": "a", "max_tokens": 100_000}),
    (400, {"domain": "a", "temperature": -1}),
    # These only the engine finds out, when the stream would have begun.
    (400, {"domain": "a", "logit_bias": {"99999": 1}}),
    (400, {"domain": "a", "stop_token_ids": [99999]}),
    (400, {"domain": "a", "allowed_token_ids": []}),
    (400, {"domain": "a", "structured_outputs": {"regex": "((("}}),
]


@pytest.mark.parametrize(("status", "fields"), REFUSALS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_errors_are_http_errors(http: httpx.Client, path: str, status: int, fields: dict[str, Any]) -> None:
    """A stream that can't begin is the error that the plain request gets, not a 200 with an event."""
    body = {**BASE, "messages": [{"role": "user", "content": "hello"}], **fields}
    body.pop("messages" if path == COMPLETIONS else "prompt")
    assert refused(http.post(path, json={**body, "stream": True}), status) == refused(http.post(path, json=body), status)


def test_prompts_that_do_not_fit(http: httpx.Client) -> None:
    """Too long, or with ids outside of the vocabulary: refused before the stream begins."""
    for prompt in ("x " * 2000, [5] * 600, [99999], [], ""):
        refused(ask(http, prompt=prompt, domain="a", stream=True), 400)
    refused(chat(http, messages=[{"role": "user", "content": "x " * 2000}], domain="a", stream=True), 400)
    refused(ask(http, stream_options={"include_usage": True}), 400, "stream_options")


def test_clients_that_leave(http: httpx.Client) -> None:
    """After streams that are cut off at several moments, and bodies that end early, the server answers as before."""
    expected = ask(http, domain="a").json()["choices"]
    for wanted in (0, 1, 3):
        with http.stream(
            "POST", COMPLETIONS, json={**BASE, "max_tokens": 400, "domain": "a", "stream": True, "ignore_eos": True}
        ) as response:
            lines = response.iter_lines()
            for _ in range(wanted):
                next(lines)
    for sent in (b"", json.dumps({**BASE, "stream": True, "max_tokens": 400}).encode()):
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent) or 50}\r\n\r\n"
        with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as raw:
            raw.sendall(head.encode() + sent)
    assert ask(http, domain="a").json()["choices"] == expected
    assert http.get("/health").status_code == 200
