"""Clients that leave, by the hundred, and clients that don't read: nothing of theirs stays, and others don't notice."""

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import CHAT, COMPLETIONS, PROMPT, ask, text
from conftest import Server, metric

pytestmark = pytest.mark.engine

LONG = {"model": "base", "prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "temperature": 1}
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset, as a client that dies does


@contextmanager
def asking(server: Server, path: str, body: dict[str, Any], reads: bool = True) -> Iterator[socket.socket]:
    """A connection on which a request has been sent; closed at the end without a word, or reset."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if not reads:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(120)
        connection.connect((host, int(port)))
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + content)
        yield connection


def crowd(server: Server, size: int) -> None:
    """Requests of all kinds under way at once, every one of which is then left."""
    messages = [{"role": "user", "content": "hello"}]
    kinds: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {**LONG, "stream": True, "domain": "a"}),
        (COMPLETIONS, {**LONG, "domain": "b"}),
        (COMPLETIONS, {**LONG, "n": 2, "stream": True}),
        (COMPLETIONS, {**LONG, "domain": "a", "memory": "rag", "max_tokens": 60, "rag_stride": 4, "stream": True}),
        (CHAT, {**LONG, "messages": messages, "stream": True, "domain": "b"}),
        (COMPLETIONS, {**LONG, "prompt": [PROMPT, "import"], "domain": "a"}),
    ]
    waiting = [asking(server, *kinds[i % len(kinds)]) for i in range(size)]
    connections = [one.__enter__() for one in waiting]
    for i, connection in enumerate(connections):
        if kinds[i % len(kinds)][1].get("stream") and i % 4:
            assert connection.recv(12).startswith(b"HTTP/1.1 200")
        if i % 2:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    for one in waiting:
        one.__exit__(None, None, None)


def held(http: httpx.Client) -> float:
    """Requests and shares of the KV cache that the engine still has."""
    page = http.get("/metrics").text
    return sum(metric(page, f"vllm:{name}") for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))


def wait_until_free(http: httpx.Client) -> None:
    """Until the engine holds nothing; a server that leaks never gets there."""
    for _ in range(300):
        text(ask(http, max_tokens=2))  # a step, after which the engine tells what it has
        if held(http) == 0:
            return
    raise AssertionError(f"the engine still holds something: {held(http)}")


def resident(server: Server) -> int:
    """Megabytes of the server's process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+)", status)
    return int(kilobytes) // 1024


def test_clients_that_leave(server: Server, http: httpx.Client) -> None:
    """160 in all: requests and KV blocks are free again, memory doesn't grow from one crowd to the next, and nobody logs an error."""
    logged, memory = len(server.text()), []
    for _ in range(4):
        crowd(server, 40)
        wait_until_free(http)
        memory.append(resident(server))
    assert memory[3] - memory[1] < 30, memory
    assert "Traceback" not in server.text()[logged:]


def test_clients_that_do_not_read(server: Server, http: httpx.Client) -> None:
    """Their answers are made, their places in the engine are free, others are served; and when they read at last all is there."""
    body = {**LONG, "stream": True, "logprobs": 5, "domain": "a"}
    waiting = [asking(server, COMPLETIONS, body, reads=False) for _ in range(12)]
    connections = [one.__enter__() for one in waiting]
    assert text(ask(http, domain="b"))
    wait_until_free(http)
    for connection in connections:
        whole = b""
        while piece := connection.recv(1 << 16):
            whole += piece
        assert whole.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in whole[-200:]
    for one in waiting:
        one.__exit__(None, None, None)
