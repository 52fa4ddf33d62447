"""The ASGI layers around the app, on a small Starlette app."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from asking import refused
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memdec.server.api.access import Access
from memdec.server.api.keys import Key
from memdec.server.api.middleware import AnswerCount, BodyLimit, KeyConcurrency, RequestId, RetryLater
from memdec.server.api.routed import Routed

LIMIT = 1000
KEYS = [Key.of("one", "first"), Key.of("second", "second", frozenset({"a"}))]


async def echo(request: Request) -> Response:
    """Answer with the body's length."""
    request.state.selection = SimpleNamespace(mode="decoder", domain=SimpleNamespace(name="test"))
    return PlainTextResponse(str(len(await request.body())))


async def broken(_: Request) -> Response:
    """Fail as no handler expects."""
    raise RuntimeError


INNER = Starlette(
    routes=[
        Route("/health", echo),
        Route("/metrics", echo),
        Route("/v1/completions", echo, methods=["POST", "OPTIONS"]),
        Route("/v1/chat/completions", broken, methods=["POST"]),
    ]
)


def guarded(keys: list[Key]) -> ASGIApp:
    """The app behind its keys."""
    return Routed(Access(INNER, keys, None), INNER.routes)


def request(app: ASGIApp, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, in process."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic one", "one", "Bearer one two", "Bearer \xfcne"])
def test_wrong_keys(header: str | None) -> None:
    """Without one of the keys the answer is a 401 in OpenAI's form that doesn't tell the key."""
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = request(guarded(KEYS), "POST", "/v1/completions", headers=headers)
    assert "one" not in refused(answer, 401, None)


@pytest.mark.parametrize("header", ["Bearer one", "bearer second", "Bearer  one"])
def test_right_keys(header: str) -> None:
    """Any of the keys will do, and the scheme's case doesn't matter."""
    answer = request(guarded(KEYS), "POST", "/v1/completions", headers={"Authorization": header})
    assert answer.status_code == 200


def test_open_paths() -> None:
    """Probes carry no key; what only looks like a browser's preflight request, and unknown paths, need one all the same."""
    app = guarded(KEYS)
    assert request(app, "GET", "/health").status_code == 200
    refused(request(app, "OPTIONS", "/v1/completions"), 401)
    refused(request(app, "GET", "/health/../v1/completions"), 401)
    refused(request(app, "GET", "/nowhere"), 401)


def test_pages_about_all_domains() -> None:
    """A key of some domains doesn't see what goes on in the others."""
    app = guarded(KEYS)
    assert request(app, "GET", "/metrics", headers={"Authorization": "Bearer one"}).status_code == 200
    refused(request(app, "GET", "/metrics", headers={"Authorization": "Bearer second"}), 403)


async def answers(app: ASGIApp, scopes: list[dict[str, Any]]) -> list[int]:
    """Statuses of requests that are all under way at once."""
    found: list[int] = []

    async def receive() -> Message:
        await asyncio.sleep(0)
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    await asyncio.gather(*(app(scope, receive, send) for scope in scopes), return_exceptions=True)
    return sorted(found)


def test_requests_of_one_key_at_once() -> None:
    """Over its limit is a 429, other keys aren't touched, and what has ended, in whatever way, no longer counts."""

    async def slow(_: Scope, __: Receive, send: Send) -> None:
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200})
        raise ConnectionError

    def scopes(key: Key, count: int) -> list[dict[str, Any]]:
        return [{"type": "http", "method": "POST", "path": "/", "headers": [], "state": {"key": key}} for _ in range(count)]

    own = Key.of("third", "third", concurrent=1)
    app = KeyConcurrency(slow, 2)
    for _ in range(3):
        mixed = [*scopes(KEYS[0], 4), *scopes(KEYS[1], 2), *scopes(own, 2)]
        assert asyncio.run(answers(app, mixed)) == [200] * 5 + [429] * 3
    assert set(app.running.values()) == {0}


def test_who_is_refused_is_told_when_to_come_again() -> None:
    """429 and 503 carry Retry-After, others don't."""

    async def answer(status: int) -> httpx.Headers:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await Response(status_code=status)(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(RetryLater(app)), base_url="http://test") as client:
            return (await client.get("/")).headers

    for status in (429, 503):
        assert 1 <= int(asyncio.run(answer(status))["retry-after"]) <= 4
    assert "retry-after" not in asyncio.run(answer(500))


def test_every_request_has_an_id() -> None:
    """The client's own comes back, and is what vLLM finds in the header; else each gets another; one that no log should hold is refused."""

    async def told(request: Request) -> Response:
        return PlainTextResponse(f"{request.headers['x-request-id']} {request.state.request_id}")

    app = RequestId(Starlette(routes=[Route("/", told)]))
    for sent in ("mine", "x" * 256, "a/b=c;d"):
        answer = request(app, "GET", "/", headers={"X-Request-Id": sent})
        assert (answer.headers["x-request-id"], answer.text) == (sent, f"{sent} {sent}")
    answers = [request(app, "GET", "/") for _ in range(2)]
    assert all(a.text == f"{a.headers['x-request-id']} {a.headers['x-request-id']}" for a in answers)
    assert len({a.text for a in answers}) == 2 and all(len(a.headers["x-request-id"]) == 32 for a in answers)
    for wrong in ([""], ["x" * 257], ["two words"], ["é"], ["one", "two"]):
        answer = request(app, "GET", "/", headers=[("X-Request-Id", value.encode()) for value in wrong])
        assert "X-Request-Id" in refused(answer, 400) and len(answer.headers["x-request-id"]) == 32


async def chunks(size: int) -> AsyncIterator[bytes]:
    """A body of this many bytes in pieces, without a content-length."""
    for start in range(0, size, 100):
        yield b"x" * min(100, size - start)


def whole(size: int) -> bytes:
    """A body of this many bytes in one piece."""
    return b"x" * size


@pytest.mark.parametrize("body", [whole, chunks])
def test_body_limit(body: Callable[[int], Any]) -> None:
    """The limit itself passes, one byte more is a 413, with and without a content-length."""
    app = BodyLimit(INNER, LIMIT)
    assert request(app, "POST", "/v1/completions", content=body(LIMIT)).text == str(LIMIT)
    assert "1,000 bytes" in refused(request(app, "POST", "/v1/completions", content=body(LIMIT + 1)), 413, None)


def test_body_limit_trusts_no_length() -> None:
    """A content-length that lies doesn't get a body past the limit, and one that is no number is ignored."""
    for length in ("5", "x", "-5"):
        answer = request(BodyLimit(INNER, LIMIT), "POST", "/v1/completions", content=whole(LIMIT + 1), headers={"content-length": length})
        refused(answer, 413)


def test_a_body_that_never_ends() -> None:
    """408 once its time is over, and the connection closes."""

    async def trickle() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(30)
        yield b"x"

    answer = request(BodyLimit(INNER, LIMIT, seconds=0.05), "POST", "/v1/completions", content=trickle())
    assert "0.05 seconds" in refused(answer, 408)
    assert answer.headers["connection"] == "close"


def counted(status: int, mode: str = "none", domain: str = "none") -> float:
    """Answers counted so far in this process."""
    labels = {"mode": mode, "domain": domain, "status": str(status)}
    return REGISTRY.get_sample_value("memdec_requests_total", labels) or 0.0


def test_every_answer_is_counted() -> None:
    """By its real status: answers of the route, refusals of the layers inside, and errors that nothing handles."""
    app = Routed(AnswerCount(Access(BodyLimit(INNER, LIMIT), KEYS, None)), INNER.routes)
    key = {"Authorization": "Bearer one"}
    before = [counted(200, "decoder", "test"), counted(401), counted(413), counted(500), counted(405)]
    request(app, "POST", "/v1/completions", headers=key)
    request(app, "POST", "/v1/completions")
    request(app, "POST", "/v1/completions", headers=key, content=whole(LIMIT + 1))
    request(app, "POST", "/v1/chat/completions", headers=key)
    request(app, "DELETE", "/v1/completions", headers=key)
    request(app, "GET", "/health")
    after = [counted(200, "decoder", "test"), counted(401), counted(413), counted(500), counted(405)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1] * 5
