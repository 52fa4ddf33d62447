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
from starlette.types import ASGIApp

from server.api.middleware import AnswerCount, ApiKey, BodyLimit

LIMIT = 1000


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
        Route("/v1/completions", echo, methods=["POST", "OPTIONS"]),
        Route("/v1/chat/completions", broken, methods=["POST"]),
    ]
)


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
    answer = request(ApiKey(INNER, ["one", "second"]), "POST", "/v1/completions", headers=headers)
    assert "one" not in refused(answer, 401, None)


@pytest.mark.parametrize("header", ["Bearer one", "bearer second", "Bearer  one"])
def test_right_keys(header: str) -> None:
    """Any of the keys will do, and the scheme's case doesn't matter."""
    answer = request(ApiKey(INNER, ["one", "second"]), "POST", "/v1/completions", headers={"Authorization": header})
    assert answer.status_code == 200


def test_open_paths() -> None:
    """Probes and browsers' preflight requests carry no key; unknown paths need one all the same."""
    app = ApiKey(INNER, ["one"])
    assert request(app, "GET", "/health").status_code == 200
    assert request(app, "OPTIONS", "/v1/completions").status_code == 200
    refused(request(app, "GET", "/health/../v1/completions"), 401)
    refused(request(app, "GET", "/nowhere"), 401)


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


def counted(status: int, mode: str = "none", domain: str = "none") -> float:
    """Answers counted so far in this process."""
    labels = {"mode": mode, "domain": domain, "status": str(status)}
    return REGISTRY.get_sample_value("memdec_requests_total", labels) or 0.0


def test_every_answer_is_counted() -> None:
    """By its real status: answers of the route, refusals of the layers inside, and errors that nothing handles."""
    app = AnswerCount(ApiKey(BodyLimit(INNER, LIMIT), ["one"]))
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
