"""The README's words, carried out: `make serve`, its curl, its Python; and the tables and the tree of the pages it leads to."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, free_port
from running import wait_until_ready

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`make serve` on a free port, ready."""
    port, log = free_port(), tmp_path_factory.mktemp("quickstart") / "log.txt"
    with log.open("wb") as stream:
        command = ["make", "serve", f"PORT={port}", f"VENV={sys.prefix}"]
        users = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as many threads as users have
        process = subprocess.Popen(command, cwd=ROOT, env=users, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    wait_until_ready(process, log, 1200)  # the first start makes the python baselines
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


def block(language: str, containing: str) -> str:
    """The one code block of a language that contains a text."""
    (found,) = [text for kind, text in BLOCKS if kind == language and containing in text]
    return str(found)


def test_the_readme_is_short() -> None:
    """One page: its first command before line 25, at most 120 lines, prose of at most 120 columns."""
    assert len(README.splitlines()) <= 120
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert all(len(line) <= 120 for line in prose.splitlines() if not line.startswith("|"))
    assert next(i for i, line in enumerate(README.splitlines(), 1) if line.startswith("make serve")) < 25


def test_the_readmes_curl_answers_and_the_header_changes_the_text(quickstart: str) -> None:
    """As printed, on this port; then without the header."""
    command = shlex.split(block("sh", "curl ").replace("http://127.0.0.1:8000", quickstart).replace("\\\n", " "))
    done = subprocess.run([*command, "-s", "-S", "--fail-with-body"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    with_memory = json.loads(done.stdout)["choices"][0]["text"]
    at = command.index("X-Domain: biomed")
    plain = command[: at - 1] + command[at + 1 :]
    base = subprocess.run([*plain, "-s", "-S", "--fail-with-body"], capture_output=True, text=True, timeout=120)
    assert json.loads(base.stdout)["choices"][0]["text"] != with_memory


def test_the_readmes_python_runs(quickstart: str) -> None:
    """With the real SDK."""
    code = block("python", "OpenAI").replace("http://127.0.0.1:8000", quickstart)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_greetings_curl_runs(quickstart: str) -> None:
    """All four domains are served, and what is pasted works."""
    names = {d["name"] for d in httpx.get(f"{quickstart}/v1/domains").json()["data"]}
    assert names == {"biomed", "finance", "law", "python"}


def test_the_metric_table_is_what_the_server_exposes(quickstart: str) -> None:
    """No metric is missing on either side."""
    listed = {name for row in re.findall(r"^\| (`memdec_.*?) \|", API, re.M) for name in re.findall(r"`(\w+)`", row)}
    page = httpx.get(f"{quickstart}/metrics").text
    exposed = set()
    for name, kind in re.findall(r"^# TYPE (memdec_\w+) (\w+)", page, re.M):
        if not name.endswith("_created"):
            exposed.add(f"{name}_total" if kind == "counter" and not name.endswith("_total") else name)
    assert listed == exposed


def test_the_printed_tree_exists() -> None:
    """Every folder that the layout names."""
    (tree,) = [text for text in re.findall(r"```\n(.*?)```", ARCHITECTURE, re.S) if "server/        the path" in text]
    top = Path()
    for line in tree.splitlines():
        folder = line.split()[0].rstrip("/")
        top = Path(folder) if not line.startswith(" ") else top
        assert (ROOT / (top if not line.startswith(" ") else top / folder)).is_dir(), line


def test_the_build_commands_parse() -> None:
    """Flags and arguments of the training section."""
    from memdec.cli import _parser

    for line in block("sh", "memdec build").splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "memdec"
        _parser(words[1]).parse_args(words[1:])
