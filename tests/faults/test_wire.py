"""What comes over the wire beside requests: trailers, blank lines, bodies that nobody wants, answers that nobody reads. No engine is needed for it."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import requests
import uvicorn
from conftest import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from memdec.server.api import linger, protocol
from memdec.server.api.access import Access
from memdec.server.api.keys import Key
from memdec.server.api.middleware import BodyLimit

pytestmark = pytest.mark.engine

LIMIT = 100_000
LARGE = b"x" * (8 << 20)  # more than the kernel's buffers take
HEADERS = {"Authorization": "Bearer key", "Content-Type": "application/json"}
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SERVED: list[str] = []


async def echo(request: Request) -> Response:
    """The body's length, and the headers as they are when it has been read."""
    length = len(await request.body())
    SERVED.append(request.url.path)
    return JSONResponse({"length": length, "headers": dict(request.headers)})


async def endless(_: Request) -> Response:
    """A stream without end."""

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)
                yield b"x" * 10_000
        finally:
            SERVED.append("left")

    return StreamingResponse(pieces())


async def slow(request: Request) -> Response:
    """An answer that takes a second."""
    await request.body()
    await asyncio.sleep(1)
    return Response("slow")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where a server with our protocol and layers listens; it has one key, `key`."""
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"]), Route("/endless", endless), Route("/slow", slow)])
    guarded = Access(BodyLimit(app, LIMIT, seconds=1), [Key.of("key", "key")], admin=None)
    found = free_port()
    config = uvicorn.Config(
        guarded, "127.0.0.1", found, http=protocol.BoundedHttp, ws="none", lifespan="off", timeout_keep_alive=1, loop="uvloop"
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield found
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive(), "connections hold the exit up"


def connect(port: int, receive: int | None = None) -> socket.socket:
    """A connection."""
    connection = socket.socket()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    return connection


def read(connection: socket.socket) -> bytes:
    """All that comes until the server ends."""
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    return found


def status(answer: bytes) -> int:
    """The first answer's."""
    return int(answer.split(b" ", 2)[1])


def sent(port: int, *pieces: bytes) -> bytes:
    """What comes back until the server ends, when all of this has been sent. Raises ConnectionError for a reset."""
    with connect(port) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read(connection)


def keep_sending(connection: socket.socket, piece: bytes, times: int, every: float = 0) -> None:
    """So many pieces. Raises ConnectionError once the server has left."""
    for _ in range(times):
        connection.sendall(piece)
        time.sleep(every)


def alive(port: int) -> None:
    """The server answers somebody else."""
    assert httpx.post(f"http://127.0.0.1:{port}/", headers=HEADERS, content=b"x", timeout=30).json()["length"] == 1


def test_trailers_are_no_headers(port: int) -> None:
    """They reach nobody, and the request is answered."""
    answer = sent(
        port, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X-Domain: law\r\nHost: evil\r\n\r\n"
    )
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert status(answer) == 200 and body["length"] == 1
    assert "x-domain" not in body["headers"] and body["headers"]["host"] == "x"


@pytest.mark.parametrize(
    "piece",
    [b"X-Y: " + b"y" * 1000 + b"\r\n", b"X-Y: y\r\n" * 1000, b"y" * 10_000],
    ids=["long ones", "many", "one without end"],
)
def test_trailers_have_a_bound(port: int, piece: bytes) -> None:
    """431, and the client can read it though it goes on for megabytes; the app has nothing of it."""
    before = len(SERVED)
    answer = sent(port, CHUNKED + b"1\r\nx\r\n0\r\n", *[piece] * 400)
    assert status(answer) == 431 and "trailers" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert len(SERVED) == before
    alive(port)


def test_what_stands_between_chunks_has_a_bound(port: int) -> None:
    """Extensions of chunks are held by nobody, but cost time: 431; small chunks alone are no fault."""
    assert status(sent(port, CHUNKED, *[b"1;" + b"y" * 2000 + b"\r\nx\r\n"] * 50)) == 431
    small = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b'"length":40000' in sent(port, small, b"1\r\nx\r\n" * 40_000, b"0\r\n\r\n")


def test_after_an_early_refusal_the_connection_ends(port: int) -> None:
    """Without a key nothing of a body or its trailers is parsed, and what comes is dropped up to a bound."""
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        answer = read(connection)
        assert status(answer) == 401 and b"connection: close" in answer.lower()
        with pytest.raises(ConnectionError):
            keep_sending(connection, b"X-Y: y\r\n" * (1 << 13), 2000)


def test_an_early_refusal_is_kept_a_while(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that neither ends nor goes on is left after a bound in seconds."""
    monkeypatch.setattr(linger, "LINGER_SECONDS", 0.3)
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert status(read(connection)) == 401
        with pytest.raises(ConnectionError):
            keep_sending(connection, b"x", 1000, every=0.02)


def by_urllib(port: int, headers: dict[str, str], body: Any) -> int:
    """Sends all, then reads."""
    try:
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/", body, headers), timeout=30)
    except urllib.error.HTTPError as error:
        json.loads(error.read())
        return error.code
    raise AssertionError("answered")


def by_requests(port: int, headers: dict[str, str], body: Any) -> int:
    """The same on a connection that is kept."""
    with requests.Session() as session:
        answer = session.post(f"http://127.0.0.1:{port}/", data=body, headers=headers, timeout=30)
        assert answer.json()["error"]
        return answer.status_code


def by_httpx(port: int, headers: dict[str, str], body: Any) -> int:
    """Another library."""
    with httpx.Client(timeout=30) as client:
        answer = client.post(f"http://127.0.0.1:{port}/", content=body, headers=headers)
        assert answer.json()["error"]
        return answer.status_code


def by_socket(port: int, headers: dict[str, str], body: Any) -> int:
    """Nothing but bytes."""
    pieces = [body] if isinstance(body, bytes) else [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in body] + [b"0\r\n\r\n"]
    length = f"Content-Length: {len(body)}" if isinstance(body, bytes) else "Transfer-Encoding: chunked"
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return status(sent(port, "\r\n".join(["POST / HTTP/1.1", "Host: x", length, *lines, "", ""]).encode(), *pieces))


CLIENTS: list[Callable[[int, dict[str, str], Any], int]] = [by_urllib, by_requests, by_httpx, by_socket]
UNWANTED: dict[str, tuple[dict[str, str], int]] = {
    "no key": ({}, 401),
    "a body over the limit": (HEADERS, 413),
    "headers over the limit": ({**HEADERS, **{f"X-{i}": "y" * 1000 for i in range(80)}}, 431),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
@pytest.mark.parametrize("why", UNWANTED)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_that_is_still_sending_can_read_the_answer(port: int, client: Any, why: str, chunked: bool) -> None:
    """Whatever its library, with and without a length."""
    headers, wanted = UNWANTED[why]
    body = (LARGE[start : start + (1 << 16)] for start in range(0, len(LARGE), 1 << 16)) if chunked else LARGE
    assert client(port, headers, body) == wanted


def test_a_slow_body_can_read_its_408(port: int) -> None:
    """A body has its seconds; who then still sends reads why."""
    with connect(port) as connection:
        connection.sendall(HEAD + b"Content-Length: 50000\r\n\r\n")
        keep_sending(connection, b"x" * 100, 60, every=0.03)
        assert status(read(connection)) == 408


def test_one_byte_does_not_keep_a_connection(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank lines and beginnings have a time, before the first request and between two; an answer under way isn't touched by it."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    asked = HEAD + b"Content-Length: 0\r\n\r\n"
    for before, after, answers in (
        (b"", b"\r\n", 0),
        (asked, b"\r\n", 1),
        (asked, b"\r\n" * 100, 1),
        (asked, b"POST / HT", 2),
        (b"", b"GET", 1),
    ):
        with connect(port) as connection:
            connection.sendall(before)
            found = connection.recv(1 << 16) if before else b""
            began = time.monotonic()
            connection.sendall(after)
            found += read(connection)
            assert found.count(b"HTTP/1.1 ") == answers and time.monotonic() - began < 20
            assert (b" 408 " in found) == ((not before.endswith(b"\r\n\r\n") and answers == 1) or answers == 2)
    busy = b"GET /slow HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n\r\n"
    answer = sent(port, busy, b"\r\nGET /sl")
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1 ") == 2 and b" 408 " in answer


def test_requests_in_a_row(port: int) -> None:
    """As many as may wait are answered, in order; by the hundred they aren't taken in, and who is being answered is answered to the end."""
    asked = b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n\r\n"
    last = asked.replace(b"Host", b"Connection: close\r\nHost")
    assert sent(port, asked * 10 + last).count(b"HTTP/1.1 200") == 11
    busy = asked.replace(b"/ ", b"/slow ", 1)
    answer = sent(port, busy + asked * 2000)
    assert 1 < answer.count(b"HTTP/1.1 200") <= protocol.PIPELINED + 2 and answer.startswith(b"HTTP/1.1 200")
    for bad in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000,
        CHUNKED + b"1\r\nx\r\nzz\r\n",
        CHUNKED + b"0\r\n" + b"X: y\r\n" * 20_000,
    ):
        answer = sent(port, busy, bad)
        assert answer.count(b"HTTP/1.1 ") == 1 and answer.endswith(b"slow"), bad[:30]


def test_no_body_of_another_request(port: int) -> None:
    """A refused request's body isn't added to that of one that waits."""
    first = b"GET /slow HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n\r\n"
    second = HEAD + b"Content-Length: 3\r\n\r\nabc"
    third = HEAD + b"X: " + b"y" * 60_000 + b"\r\nY: " + b"y" * 6_000 + b"\r\nContent-Length: 5\r\n\r\nmore!"
    assert b'"length":3' in sent(port, first + second + third)


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
def test_upgrades_are_ignored(port: int, upgrade: bytes) -> None:
    """As HTTP allows: an answer in HTTP/1.1, then the end; a body is read (Java's client asks so), what follows it is not."""
    asked = HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + upgrade + b"\r\nHTTP2-Settings: AAMA\r\n"
    for body in (b"", b"abc"):
        answer = sent(port, asked + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"\x81\x85 frames, or what else " * 2000)
        assert status(answer) == 200 and answer.count(b"HTTP/1.1 ") == 1 and b'"length":%d' % len(body) in answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\n\r\nx",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET x y z\r\n\r\n",
    ],
)
def test_what_is_no_http(port: int, data: bytes) -> None:
    """A 400 in the form of all errors, and the end."""
    answer = sent(port, data)
    assert status(answer) in (400, 401) and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] in (400, 401)


def test_answers_that_nobody_reads(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes nothing for so long is left, and its stream ended; one that takes little is not."""
    monkeypatch.setattr(linger, "UNTAKEN_SECONDS", 0.5)
    asked = b"GET /endless HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\n\r\n"
    SERVED.clear()
    with ExitStack() as stack:
        *connections, reader = [stack.enter_context(connect(port, receive=4096)) for _ in range(101)]
        for connection in (*connections, reader):
            connection.sendall(asked)
        deadline = time.monotonic() + 60
        while SERVED.count("left") < 100 and time.monotonic() < deadline:
            assert reader.recv(1 << 20)
        assert SERVED.count("left") == 100
        assert reader.recv(1 << 20)
    alive(port)
