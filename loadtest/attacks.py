"""Attack a running server as a malicious client could, and measure how long `/health` takes meanwhile.

    python loadtest/attacks.py http://127.0.0.1:8000 [--key KEY] [--only NAME …]

Only on a loopback address; bounded in count, bytes and time, stops by itself. Prints a row an attack (attack | outcome | worst `/health`) and one JSON
line last; the exit code is 1 if one of them was lost, or if the server doesn't answer afterwards. To add an attack, write a function and put it into ATTACKS.
"""

import argparse
import ipaddress
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

WAIT = 60.0  # seconds for any single answer
EVERY = 0.05  # seconds between two looks at /health
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Target:
    """The server under attack."""

    url: str
    key: str | None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 80

    def head(self, path: str, *lines: str, key: bool = True) -> bytes:
        """The head of a POST request, without the blank line that ends it."""
        credentials = [f"Authorization: Bearer {self.key}"] if self.key and key else []
        return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *credentials, *lines, ""]).encode()

    def connect(self, receive: int | None = None) -> socket.socket:
        """Open a connection; `receive`: size of its receive buffer in bytes."""
        connection = socket.socket()
        if receive is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        connection.settimeout(WAIT)
        connection.connect(self.address)
        return connection

    def post(self, path: str, body: Any) -> httpx.Response:
        """An ordinary request."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=WAIT)


@dataclass(frozen=True)
class Row:
    """The result of an attack."""

    attack: str
    outcome: str
    lost: bool
    health: float
    """Seconds of the slowest `/health` meanwhile."""


class Health(threading.Thread):
    """Thread that polls `/health` during an attack."""

    def __init__(self, target: Target) -> None:
        super().__init__(daemon=True)
        self.target, self.worst, self.over = target, 0.0, threading.Event()

    def run(self) -> None:
        """Poll until `over` is set; a request that fails counts as WAIT seconds."""
        with httpx.Client(base_url=self.target.url, timeout=WAIT) as client:
            while not self.over.wait(EVERY):
                began = time.monotonic()
                try:
                    client.get("/health")
                    took = time.monotonic() - began
                except httpx.HTTPError:
                    took = WAIT
                self.worst = max(self.worst, took)


def send(connection: socket.socket, pieces: list[bytes]) -> int:
    """Send the pieces until the server closes the connection; returns the bytes it accepted."""
    taken = 0
    try:
        for piece in pieces:
            connection.sendall(piece)
            taken += len(piece)
    except OSError:
        pass
    return taken


def receive(connection: socket.socket) -> bytes:
    """Receive until the server closes or resets the connection, or sends nothing for WAIT seconds."""
    answer = b""
    try:
        while piece := connection.recv(1 << 16):
            answer += piece
    except OSError:
        pass
    return answer


def status(answer: bytes) -> int:
    """Status code of a response; 0 if there is none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def endless_trailers(target: Target) -> tuple[str, bool]:
    """200 MB of trailer lines behind a body, without a key."""
    with target.connect() as connection:
        connection.sendall(target.head("/v1/completions", "Transfer-Encoding: chunked", key=False) + b"\r\n1\r\nx\r\n0\r\n")
        taken = send(connection, [b"X-Y: y\r\n" * (MEGABYTE // 8)] * 200)
        return f"{status(receive(connection)) or 'closed'} after {taken // MEGABYTE} MB", taken >= 200 * MEGABYTE


def trailers_as_headers(target: Target) -> tuple[str, bool]:
    """A trailer that chooses a domain there isn't."""
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    lines = ("Transfer-Encoding: chunked", "Connection: close")
    chunked = b"\r\n%x\r\n%b\r\n0\r\nX-Domain: no-such-domain\r\n\r\n" % (len(body), body)
    with target.connect() as connection:
        connection.sendall(target.head("/v1/completions", *lines) + chunked)
        code = status(receive(connection))
    return f"{code}", code != 200


def blank_lines(target: Target) -> tuple[str, bool]:
    """One blank line a second, on a connection that has had its answer."""
    with target.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        began, open_for = time.monotonic(), 0.0
        while open_for < WAIT and send(connection, [b"\r\n"]):
            time.sleep(1)
            open_for = time.monotonic() - began
    return f"open for {open_for:.0f} s", open_for >= WAIT


def bodies_over_the_limit(target: Target) -> tuple[str, bool]:
    """Clients that send 16 MB and then read."""
    codes: Counter[int] = Counter()
    for length in ("Content-Length: 16777216", "Transfer-Encoding: chunked"):
        for key in (True, False):
            with target.connect() as connection:
                frame = b"100000\r\n%b\r\n" if "chunked" in length else b"%b"
                send(connection, [target.head("/v1/completions", length, key=key) + b"\r\n", *[frame % (b"x" * MEGABYTE)] * 16])
                codes[status(receive(connection))] += 1
    return ", ".join(f"{n} × {code or 'reset'}" for code, n in sorted(codes.items())), codes[0] > 0


def pipelined_requests(target: Target) -> tuple[str, bool]:
    """100,000 requests in one go."""
    asked = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with target.connect() as connection:
        sender = threading.Thread(target=send, args=(connection, [asked * 1000] * 100), daemon=True)
        sender.start()
        answers = receive(connection).count(b"HTTP/1.1 ")
    return f"{answers} answers", answers >= 100_000


def idle_connections(target: Target) -> tuple[str, bool]:
    """500 connections that send nothing or half a request line, and one ordinary request meanwhile."""
    with ExitStack() as stack:
        for number in range(500):
            connection = stack.enter_context(target.connect())
            send(connection, [b"GET /he"] if number % 2 else [])
        code = target.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code
    return f"{code} for somebody else", code != 200


def unread_streams(target: Target) -> tuple[str, bool]:
    """200 streamed completions whose clients don't read, and one ordinary request meanwhile."""
    body = json.dumps({"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True, "logprobs": 5}).encode()
    with ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(target.connect(receive=4096))
            send(connection, [target.head("/v1/completions", f"Content-Length: {len(body)}") + b"\r\n" + body])
        code = target.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code
    return f"{code} for somebody else", code not in (200, 429, 503)


def websockets(target: Target) -> tuple[str, bool]:
    """100 requests to upgrade to WebSocket, each followed by frames."""
    lines = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13", "Content-Length: 2")
    codes: Counter[int] = Counter()
    for _ in range(100):
        with target.connect() as connection:
            send(connection, [target.head("/v1/completions", *lines) + b"\r\n{}" + b"\x81\x85frame" * 1000])
            codes[status(receive(connection))] += 1
    return ", ".join(f"{n} × {code or 'reset'}" for code, n in sorted(codes.items())), bool(codes[0] or codes[101])


USER = {"role": "user", "content": ""}
HEAVY: dict[str, tuple[str, dict[str, Any]]] = {
    "1.9 MB to tokenise": ("/tokenize", {"prompt": "def f(x): " * 190_000}),
    "1.9 MB to complete": ("/v1/completions", {"prompt": "def f(x): " * 190_000}),
    "48,000 messages": ("/v1/chat/completions", {"messages": [USER] * 48_000}),
    "250,000 stop tokens": ("/v1/completions", {"prompt": "x", "stop_token_ids": list(range(250_000))}),
    "50,000 parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 50_000}]}),
    "a model of 1.9 MB": ("/v1/completions", {"prompt": "x", "model": "m" * 1_900_000}),
    "a domain of 1.9 MB": ("/v1/completions", {"prompt": "x", "domain": "m" * 1_900_000}),
    "a model of slashes": ("/tokenize", {"prompt": "x", "model": "/a" * 20_000}),  # more would hold an unmended server for hours
}


def heavy_bodies(target: Target) -> tuple[str, bool]:
    """Bodies within the limit that are expensive to parse or tokenize, or that an error message would quote in full."""
    largest, lost = 0, False
    for path, body in HEAVY.values():
        answer = target.post(path, {"max_tokens": 1, **body} if path.startswith("/v1") else body)
        if answer.status_code != 200:
            largest = max(largest, len(answer.content))
            lost |= answer.status_code >= 500
    return f"largest error {largest:,} bytes", lost or largest > 2048


ATTACKS: list[Callable[[Target], tuple[str, bool]]] = [
    endless_trailers, trailers_as_headers, blank_lines, bodies_over_the_limit, pipelined_requests, idle_connections, unread_streams, websockets,
    heavy_bodies,
]  # fmt: skip


def carry_out(target: Target, attack: Callable[[Target], tuple[str, bool]], slowest: float) -> Row:
    """Run one attack. It is lost if its function says so, or if a `/health` takes more than `slowest` seconds."""
    health = Health(target)
    health.start()
    try:
        outcome, lost = attack(target)
    except (OSError, httpx.HTTPError) as error:
        outcome, lost = f"{type(error).__name__}: {error}"[:80], True
    health.over.set()
    health.join(WAIT)
    return Row(attack.__name__.replace("_", " "), outcome, lost or health.worst > slowest, round(health.worst, 3))


def require_loopback(url: str) -> None:
    """Exit unless the server is on this machine."""
    host = urlsplit(url).hostname or ""
    if urlsplit(url).scheme != "http" or not (host == "localhost" or _is_loopback(host)):
        sys.exit(f"{url}: wanted http:// and a loopback address; attack your own server, on its own machine")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main() -> None:
    """Carry out all attacks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key", help="an API key, if the server wants one")
    parser.add_argument(
        "--slowest-health", type=float, default=2.0, metavar="S", help="seconds over which an attack counts as lost (default: 2)"
    )
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=[attack.__name__ for attack in ATTACKS])
    args = parser.parse_args()
    require_loopback(args.url)
    target, rows = Target(args.url.rstrip("/"), args.key), []
    print("| attack | outcome | worst /health |\n|---|---|---|")
    for attack in ATTACKS:
        if not args.only or attack.__name__ in args.only:
            row = carry_out(target, attack, args.slowest_health)
            rows.append(row)
            print(f"| {row.attack} | {'LOST: ' if row.lost else ''}{row.outcome} | {row.health:.2f} s |", flush=True)
    alive = target.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
    print(json.dumps({"attacks": [asdict(row) for row in rows], "lost": sum(row.lost for row in rows), "alive": alive}))
    sys.exit(0 if alive and not any(row.lost for row in rows) else 1)


if __name__ == "__main__":
    main()
