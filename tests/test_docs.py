"""The pages: their prose and what they name; and docs/train.md, carried out on a tiny corpus with a toy base."""

import re
import shlex
import shutil
import sysconfig
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, start_server, stop_server

from memdec.cli import _parser, main
from memdec.decoders.build_options import BuildOptions
from memdec.decoders.reading.names import STAGES
from memdec.server.api.access import NEEDS

pytestmark = pytest.mark.slow

GUIDE = (ROOT / "docs" / "train.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.S) for line in block.splitlines()]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "evaluation" / "README.md",
    ROOT / "decoders" / "zoo" / "README.md",
]  # written by hand, unlike the tables and reports that programs write
WIDTH = 120  # columns
# What the defaults would take half an hour for.
TINY = ["--teacher-tokens", "4096", "--entries", "2000", "--neighbours", "8", "--student-tokens", "4096", "--knn-tokens", "4096"]


@pytest.fixture
def here(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `my/notes`, some of the standard library's text, and a toy where the guide has the embedded base."""
    notes = tmp_path / "my" / "notes"
    notes.mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    for split, names in {"train": ("argparse", "typing"), "valid": ("shlex", "sched"), "test": ("queue", "reprlib")}.items():
        (notes / f"{split}.txt").write_text("\n\n".join((library / f"{n}.py").read_text().replace("\n\n", "\n") for n in names))
    (tmp_path / "decoders" / "zoo").mkdir(parents=True)
    shutil.copytree(toys / "base", tmp_path / "decoders" / "zoo" / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_guide_from_text_to_answers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Build, verify, serve, ask."""
    build, verify, serve = (shlex.split(line) for line in COMMANDS)
    assert [words[:2] for words in (build, verify, serve)] == [["memdec", "build"], ["memdec", "verify"], ["memdec", "serve"]]
    assert main([*build[1:], *TINY]) == 0
    left = {p.name for p in (here / "my" / "memory.work").iterdir()}
    assert left == {s.replace("-", "_") for s in STAGES} - {"package"}
    assert (here / "my" / "memory" / "README.md").read_text().count("memdec serve")
    assert main(verify[1:]) == 0
    assert "can be served" in capsys.readouterr().out

    words = [str(here / w) if (here / w).exists() else w.replace("=my/", f"={here}/my/") for w in serve[2:]]
    server = start_server(here / "log.txt", *words, "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(128 << 20))
    try:
        body = {"model": httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"], "prompt": "def", "max_tokens": 4}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Domain": "notes"}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Memory-Domain"] == "notes"
    finally:
        stop_server(server)


def test_the_guides_tables_are_the_programs() -> None:
    """Every stage in its order; every option it names, with its default."""
    assert re.findall(r"^\| \d \| `memdec ([\w-]+)` \|", GUIDE, re.M) == list(STAGES)
    rows = {flag: row for row in re.findall(r"^\| (`--.*)\|$", GUIDE, re.M) for flag in re.findall(r"`--([\w-]+)", row.split("|")[0])}
    assert {"teacher-tokens", "entries", "beta"} <= rows.keys()
    for flag, row in rows.items():
        default = getattr(BuildOptions(), flag.replace("-", "_"), None)
        if default is not None:
            assert (f"{default:,}" if isinstance(default, int) else str(default)) in row
    for line in COMMANDS:
        if not line.startswith("memdec serve"):
            words = shlex.split(line)[1:]
            _parser(words[0]).parse_args(words)


def prose(text: str) -> list[str]:
    """The lines of a page that are neither code nor a table."""
    return [line for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines() if not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_short(page: Path) -> None:
    """So that they can be read beside code, and a diff shows what changed."""
    assert [line for line in prose(page.read_text()) if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    """Python files, by their path from the top or from the folder that the page is about, or by their name; folders; links to files."""
    text = page.read_text()
    sources = [p.relative_to(ROOT).as_posix() for top in ("server", "decoders", "loadtest", "tests") for p in (ROOT / top).rglob("*.py")]
    for name in re.findall(r"(?<![\w./-])[\w/-]+\.py\b", text):
        assert any(f"/{source}".endswith(f"/{name}") for source in sources), name
    for path in re.findall(r"(?<![\w./-])(?:server|decoders|tests|loadtest|deploy|requirements)/[\w./-]*", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_the_api_page_lists_every_endpoint() -> None:
    """Those that the table of access serves, and no other; a parameter is called what the route calls it."""
    section = (ROOT / "docs" / "api.md").read_text().split("## Endpoints")[1].split("\n## ")[0]
    listed = re.findall(r"`((?:GET|POST|DELETE) /\S*)`", "\n".join(line.split(" | ")[0] for line in section.splitlines()))
    assert sorted(listed) == sorted(entry.replace(":path", "") for entry in NEEDS)
