"""Who may import whom: arrows between folders run one way, `decoders` knows nothing of `server`, and few rooms know vLLM."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(p for top in ("server", "decoders") for p in (ROOT / top).rglob("*.py")), *(ROOT / "memdec").glob("*.py")])
KNOW_VLLM = {"server/launch", "server/engine", "server/worker", "server/model"}
# A folder may import those below it in this list, and what lies at the top of `server` may be imported by all.
ROOMS = (
    "server/launch",
    "server/api",
    "server/engine",
    "server/worker",
    "server/model",
    "server/retrieval",
    "server/routing",
    "decoders/study",
    "decoders",
)


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
        assert seen <= {"server", "server/routing", "decoders"}
    else:
        assert seen <= {"server", *ROOMS[ROOMS.index(own) :]}
    if own.startswith("decoders"):
        assert not any(name.startswith("server") for name in seen)


def test_routing_knows_neither_http_nor_engine() -> None:
    """What decides is plain Python, so that it can be tested without either."""
    for path in (ROOT / "server" / "routing").glob("*.py"):
        assert not tops(path) & {"fastapi", "starlette", "torch"}
