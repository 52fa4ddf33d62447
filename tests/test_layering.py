"""Who may import whom: arrows between folders run one way, `decoders` knows nothing of `server`, and few rooms know vLLM."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(p for top in ("server", "decoders") for p in (ROOT / top).rglob("*.py")), *(ROOT / "memdec").glob("*.py")])
KNOW_VLLM = {"server/launch", "server/engine", "server/worker", "server/model"}
READING = "decoders/reading"  # all of `decoders` that the server may import
# A folder may import those below it in this list, and what lies at the top of `server` may be imported by all.
ROOMS = (
    "server/launch",
    "server/api",
    "server/engine",
    "server/worker",
    "server/model",
    "server/retrieval",
    "server/routing",
    "server/seams",
    "decoders/study",
    "decoders",
    READING,
)
# What runs in the engine process must load nothing that only trains.
WORKER_ROOMS = ("server/worker", "server/model", "server/retrieval")
TRAINING = {"decoders/train.py", "decoders/corpus.py", "decoders/build.py"}


@functools.cache
def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def room(path: Path) -> str:
    """The folder that a file is in, from the root."""
    return str(path.parent.relative_to(ROOT))


def files_of(names: set[str]) -> set[Path]:
    """The files of ours that dotted names lie in, and the `__init__.py` of every package on the way to them."""
    files = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "memdec":
            below = [ROOT / "memdec", *(ROOT.joinpath(*parts[1:end]) for end in range(2, len(parts) + 1))]
            files |= {file for place in below for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()}
    return files


def reached_from(path: Path) -> set[Path]:
    """Every file of ours that a file imports, directly or through others."""
    reached: set[Path] = set()
    waiting = {path}
    while waiting:
        file = waiting.pop()
        reached.add(file)
        waiting |= files_of(imported(file)) - reached
    return reached


def rooms_of(names: set[str]) -> set[str]:
    """The rooms that dotted names of ours lie in."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "memdec" and len(parts) > 1 and parts[1] in ("server", "decoders"):
            folder = "/".join(parts[1:3])
            found.add(folder if (ROOT / folder).is_dir() else parts[1])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    """One file's imports."""
    assert not tops(path) & {"server", "decoders"}, "the import names begin with memdec"
    own = room(path)
    if own not in KNOW_VLLM:
        assert "vllm" not in tops(path)
    if own == "memdec":
        return
    seen = rooms_of(imported(path))
    if own == "server":  # shared by all rooms, so it may lean on none but what only decides
        assert seen <= {"server", "server/routing", READING}
    elif own.startswith("server"):
        below = ROOMS[ROOMS.index(own) :]
        assert seen <= {"server", READING, *(name for name in below if name.startswith("server"))}
    else:
        assert seen <= set(ROOMS[ROOMS.index(own) :])


def test_routing_knows_neither_http_nor_engine() -> None:
    """What decides is plain Python, so that it can be tested without either."""
    for path in (ROOT / "server" / "routing").glob("*.py"):
        assert not tops(path) & {"fastapi", "starlette", "torch"}


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) in WORKER_ROOMS], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_worker_reaches_no_training(path: Path) -> None:
    """The engine process loads neither the training loop nor the corpus reader, directly or through others."""
    assert not {str(file.relative_to(ROOT)) for file in reached_from(path)} & TRAINING


def test_what_is_reached_is_followed_through_other_files() -> None:
    """The rule above sees imports of imports, inside functions too."""
    reached = {str(file.relative_to(ROOT)) for file in reached_from(ROOT / "decoders" / "study" / "study.py")}
    assert reached >= TRAINING | {"decoders/loss.py", "decoders/reading/weights.py", "decoders/reading/__init__.py"}
