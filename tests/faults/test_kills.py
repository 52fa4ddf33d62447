"""SIGTERM and SIGKILL of server, engine and worker, a decoder's folder that goes: no client hangs, the exit code tells, a supervisor brings it back."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import ROOT, Server, free_port, start_server

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.package import Package

pytestmark = pytest.mark.slow

BODY = {"prompt": "def f(", "max_tokens": 450, "ignore_eos": True, "domain": "a", "stream": True}


@pytest.fixture
def own_server(toys: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server for one test to end, on a copy of its decoder, to be broken."""
    decoder = shutil.copytree(toys / "qwen_a", tmp_path / "decoder")
    running = start_server(
        tmp_path / "log.txt", str(toys / "base"), "--decoder", f"a={decoder}", "--max-model-len", "512", "--dtype", "float32",
        "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--shutdown-timeout", str(request.param),
        "--step-timeout", "3",
    )  # fmt: skip
    yield running
    running.process.kill()


class Stream(threading.Thread):
    """A client in mid-stream."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.lines: list[str] = []
        self.failure: httpx.HTTPError | None = None
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


@pytest.mark.parametrize("own_server", [5], indirect=True)
def test_the_engines_death_ends_streams_and_the_server(own_server: Server) -> None:
    """A decoder truncated and deleted under the server changes no answer. SIGKILL of every engine process: an error event, exit code 1."""
    body = {**BODY, "max_tokens": 20, "stream": False, "temperature": 0}
    answers = [httpx.post(f"{own_server.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]]
    decoder = own_server.log.parent / "decoder"
    with (decoder / "model.safetensors").open("r+b") as stream:
        stream.truncate(1000)
    answers.append(httpx.post(f"{own_server.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"])
    with pytest.raises(PackageError, match="truncated"):
        Package.open(decoder)
    shutil.rmtree(decoder)
    answers.append(httpx.post(f"{own_server.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"])
    assert len(set(answers)) == 1
    a_stopped_engine_is_noticed(own_server)
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
    assert ended_with_an_error(client)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{own_server.url}/health", timeout=5)


def a_stopped_engine_is_noticed(server: Server) -> None:
    """SIGSTOP while it has work: /live and /health turn 503 and say how long it has been; SIGCONT: they are 200 again, and the stream goes on."""
    assert httpx.get(f"{server.url}/live").json() == {"status": "alive", "seconds_without_a_step": None}
    client = Stream(server.url)
    client.start()
    assert client.started.wait(60)
    (engine,) = [pid for pid in children(server.process.pid) if b"VLLM" in cmdline(pid)]
    os.kill(engine, signal.SIGSTOP)
    try:
        stopped = wait_for_live(server, 503)
        assert stopped["status"] == "hung" and stopped["seconds_without_a_step"] >= 3
        assert httpx.get(f"{server.url}/health").status_code == 503
    finally:
        os.kill(engine, signal.SIGCONT)
    assert wait_for_live(server, 200)["status"] == "alive"
    client.join(120)
    assert "data: [DONE]" in client.lines[-2:]


def wait_for_live(server: Server, status: int) -> dict[str, Any]:
    """What /live says, as soon as it has this status."""
    for _ in range(600):
        answer = httpx.get(f"{server.url}/live", timeout=5)
        if answer.status_code == status:
            return dict(answer.json())
        time.sleep(0.1)
    raise AssertionError(answer.text)


def ended_with_an_error(client: Stream) -> bool:
    """Whether a stream told its client that it broke: by an event, or by a connection that was cut."""
    events = [json.loads(line[6:]) for line in client.lines if line.startswith("data: {")]
    return client.failure is not None or "error" in events[-1]


def test_sigterm_while_starting(toys: Path, tmp_path: Path) -> None:
    """As the signal does, and nothing stays behind."""
    words = ["serve", str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--enforce-eager", "--port", str(free_port())]
    with (tmp_path / "log.txt").open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "memdec", *words], cwd=ROOT, stdout=stream, stderr=stream)
    while not any(b"VLLM" in cmdline(pid) for pid in children(process.pid)):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.2)
    family = children(process.pid)
    process.terminate()
    assert process.wait(60) in (-signal.SIGTERM, 143)
    wait_until_gone(family)


SUPERVISOR = """
[supervisord]
nodaemon=true
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
[program:memdec]
command={command}
directory={root}
environment=VLLM_ENABLE_V1_MULTIPROCESSING="1"
stdout_logfile={folder}/log.txt
redirect_stderr=true
autorestart=unexpected
exitcodes=0
startsecs=0
stopwaitsecs=60
"""


@pytest.fixture
def supervised(toys: Path, tmp_path: Path) -> Iterator[Server]:
    """The server under a real supervisor, with a worker process of its own."""
    port = free_port()
    command = f"{sys.executable} -m memdec serve {toys / 'base'} --decoder a={toys / 'qwen_a'} --max-model-len 512 --dtype float32"
    command += f" --enforce-eager --kv-cache-memory-bytes {64 << 20} --port {port}"
    (tmp_path / "supervisord.conf").write_text(SUPERVISOR.format(folder=tmp_path, root=ROOT, command=command))
    words = [sys.executable, "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(tmp_path / "supervisord.conf")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield Server(f"http://127.0.0.1:{port}", process, tmp_path / "log.txt")
    family = children(process.pid)
    process.terminate()
    process.wait(90)
    wait_until_gone(family)


def test_a_supervisor_brings_it_back(supervised: Server) -> None:
    """After SIGKILL of the worker alone, which ends stream, engine and server; after SIGKILL of the server, whose engine must not stay behind."""
    text = wait_until_answered(supervised)
    family = children(supervised.process.pid)
    client = Stream(supervised.url)
    client.start()
    assert client.started.wait(60)
    (worker,) = [pid for pid in family if b"Worker" in cmdline(pid)]
    os.kill(worker, signal.SIGKILL)
    client.join(60)
    assert not client.is_alive() and ended_with_an_error(client)
    wait_until_gone(family)
    assert wait_until_answered(supervised) == text

    family = children(supervised.process.pid)
    os.kill(family[0], signal.SIGKILL)
    wait_until_gone(family)
    log = supervised.log.parent / "supervisord.log"
    for _ in range(600):
        if log.read_text().count("spawned") == 3:
            break
        time.sleep(0.1)
    ends = re.findall(r"exited: memdec \((.*?)\)", log.read_text())
    assert ends == ["exit status 1; not expected", "terminated by SIGKILL; not expected"] and log.read_text().count("spawned") == 3


def wait_until_answered(server: Server) -> str:
    """A completion, as soon as there is a server."""
    for _ in range(1200):
        assert server.process.poll() is None
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                body = {**BODY, "max_tokens": 8, "stream": False, "temperature": 0}
                return str(httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"])
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise AssertionError(server.text()[-3000:])


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


def cmdline(pid: int) -> bytes:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_until_gone(family: list[int]) -> None:
    """Until no process of a family runs."""
    for _ in range(600):
        if not any(running(pid) for pid in family):
            return
        time.sleep(0.1)
    raise AssertionError([cmdline(pid) for pid in family if running(pid)])


def running(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
