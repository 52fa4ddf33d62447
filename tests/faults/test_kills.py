"""SIGTERM, and an engine that dies: no client hangs, and the exit code tells."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Server, start_server

BODY = {"prompt": "def f(", "max_tokens": 450, "ignore_eos": True, "domain": "a", "stream": True}


@pytest.fixture
def own_server(toys: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server for one test to end."""
    running = start_server(
        tmp_path / "log.txt", str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--max-model-len", "512", "--dtype", "float32",
        "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--shutdown-timeout", str(request.param),
    )  # fmt: skip
    yield running
    running.process.kill()


class Stream(threading.Thread):
    """A client in mid-stream."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.lines, self.failure = url, [], None
        self.started = threading.Event()

    def run(self) -> None:
        """Read until the end, however it comes."""
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=BODY, timeout=120) as response:
                for line in response.iter_lines():
                    self.lines.append(line)
                    self.started.set()
        except httpx.HTTPError as error:
            self.failure = error
        self.started.set()


@pytest.mark.parametrize("own_server", [60], indirect=True)
def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(own_server: Server) -> None:
    """The stream ends with [DONE], new requests and /health get 503, the exit code is 0."""
    clients = [Stream(own_server.url) for _ in range(4)]
    for client in clients:
        client.start()
        assert client.started.wait(60)
    own_server.process.send_signal(signal.SIGTERM)
    statuses: set[int] = set()
    while any(c.is_alive() for c in clients) and 503 not in statuses:
        try:
            statuses.add(httpx.get(f"{own_server.url}/health", timeout=30).status_code)
            refused = httpx.post(f"{own_server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=30)
            if refused.status_code == 503:
                assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        except httpx.TransportError:
            break
    for client in clients:
        client.join(120)
        assert client.lines[-2:-1] == ["data: [DONE]"] or "data: [DONE]" in client.lines[-2:]
    assert own_server.process.wait(60) == 0
    assert 503 in statuses


@pytest.mark.parametrize("own_server", [1], indirect=True)
def test_a_drain_that_takes_too_long_ends_with_an_error_event(own_server: Server) -> None:
    """Clients get an error or a cut connection, never silence; the server is gone soon after."""
    clients = [Stream(own_server.url) for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.started.wait(60)
    own_server.process.send_signal(signal.SIGTERM)
    assert own_server.process.wait(60) == 0
    for client in clients:
        client.join(30)
        assert not client.is_alive()
        ended = "data: [DONE]" in client.lines[-2:] or client.failure is not None or any("error" in line for line in client.lines)
        assert ended


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    found: list[int] = []
    frontier = [pid]
    while frontier:
        frontier = [child for child, parent in pairs if parent in frontier]
        found += frontier
    return found


@pytest.mark.parametrize("own_server", [5], indirect=True)
def test_the_engines_death_ends_streams_and_the_server(own_server: Server) -> None:
    """SIGKILL of every engine process: an error event in the stream, exit code 1."""
    client = Stream(own_server.url)
    client.start()
    assert client.started.wait(60)
    for pid in children(own_server.process.pid):
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"VLLM" in name or b"spawn_main" in name:
            os.kill(pid, signal.SIGKILL)
    assert own_server.process.wait(60) == 1
    client.join(30)
    assert not client.is_alive()
    events = [json.loads(line[6:]) for line in client.lines if line.startswith("data: {")]
    assert client.failure is not None or "error" in events[-1]
    time.sleep(1)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{own_server.url}/health", timeout=5)


@pytest.mark.parametrize("own_server", [5], indirect=True)
def test_no_process_outlives_a_killed_server(own_server: Server) -> None:
    """SIGKILL of the server itself: its engine must not stay behind, holding memory."""
    family = children(own_server.process.pid)
    assert family
    own_server.process.kill()
    own_server.process.wait(30)
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in family):
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family if running(pid)]
        time.sleep(0.2)


def running(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
