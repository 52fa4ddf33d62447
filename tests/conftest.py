"""Fixtures shared by all tests: toy models, and one real server on them for the whole session."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

sys.path.insert(0, str(Path(__file__).parent))
# Toys need no more, here and in the servers: two test processes share two cores, and OpenMP's threads that wait for each other slow both down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_ENABLE_RESPONSES_API_STORE", "1")  # read by vLLM; touches /v1/responses alone

from ngram_engine import make_memories
from running import wait_until_ready
from toys import make_toys

from memdec.decoders.corpus import Corpus
from memdec.decoders.retrieval_build import RetrievalBuild, RetrievalOptions

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Server:
    """A running `memdec serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """Everything it has printed."""
        return self.log.read_text(errors="replace")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(log: Path, *arguments: str, wait: float = 240, stderr: Path | None = None, port: int | None = None) -> Server:
    """Start `memdec serve` with these arguments and wait until it says that it is ready. `stderr`: a file of its own for that."""
    port = port or free_port()
    command = [sys.executable, "-m", "memdec", "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as stream, (stderr or Path(os.devnull)).open("wb") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=errors if stderr else subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    wait_until_ready(process, log, wait)
    return server


def stop_server(server: Server, wait: float = 60) -> int:
    """SIGTERM, then the exit code."""
    server.process.terminate()
    try:
        return server.process.wait(wait)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise


TIERS = ("slow", "engine", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test has a tier; most are units. Files with slow tests come first, so that two test processes end at about the same time."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in TIERS):
            item.add_marker("unit")
    first: dict[Path, int] = {}
    for item in items:
        tier = next(i for i, name in enumerate(TIERS) if item.get_closest_marker(name))
        first[item.path] = min(tier, first.get(item.path, tier))
    items.sort(key=lambda item: first[item.path])


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the toy models base, qwen_a, qwen_b, gpt_a, gpt_b."""
    return make_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session")
def retrieval(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Retrieval folder of domain a, for the toy base: a few thousand tokens of the standard library."""
    root = tmp_path_factory.mktemp("retrieval")
    (root / "text").mkdir()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[40:80]
    for split, names in (("train", files[:20]), ("valid", files[20:30]), ("test", files[30:])):
        text = "\n\n".join(f.read_text(errors="ignore")[:3000] for f in names)
        (root / "text" / f"{split}.txt").write_text(text)
    options = RetrievalOptions(entries=8000, passage=32, query=16, valid_windows=4)
    return RetrievalBuild("a", Corpus.open(str(root / "text")), toys / "base", root / "a", root / "work", options).run()


@pytest.fixture(scope="session")
def ngrams(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> n-gram memory for the toy base: one of every order, o2 to o8, one for domain a, one of text that no prompt has."""
    return make_memories(tmp_path_factory.mktemp("ngrams"), toys)


@pytest.fixture(scope="session")
def server(toys: Path, retrieval: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on the toys with domains a and b, a with a datastore; also used for its metrics, so requests of all tests add up."""
    running = start_server(
        tmp_path_factory.mktemp("server") / "log.txt", str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--decoder", f"b={toys / 'qwen_b'}",
        "--datastore", f"a={retrieval}", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(128 << 20), "--max-body-bytes", "100000",
        "--enable-prompt-tokens-details", "--enable-tokenizer-info-endpoint",
    )  # fmt: skip
    yield running
    stop_server(running)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client of the session's server."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture
def sdk(http: httpx.Client) -> Iterator[OpenAI]:
    """OpenAI's client of the session's server; without its silent retries."""
    with OpenAI(base_url=str(http.base_url.join("/v1")), api_key="none", max_retries=0, timeout=120) as client:
        yield client


def metric(page: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples whose labels include these."""
    total = 0.0
    for line in page.splitlines():
        match = re.fullmatch(r"([\w:]+)(\{.*\})? (\S+)(?: \S+)?", line)
        if match and match[1] == name and all(f'{k}="{v}"' in (match[2] or "") for k, v in labels.items()):
            total += float(match[3])
    return total
