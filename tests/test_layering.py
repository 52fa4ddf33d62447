"""Who may import whom: `server` may import `decoders`, never the reverse; only `server.engine` and `server.model` import vLLM."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for top in ("server", "decoders") for p in (ROOT / top).rglob("*.py"))
KNOWS_VLLM = (ROOT / "server" / "engine", ROOT / "server" / "model")


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    """One file's imports."""
    names = imported(path)
    if ROOT / "decoders" in path.parents:
        assert "server" not in names
    if not any(folder in path.parents for folder in KNOWS_VLLM):
        assert "vllm" not in names


def test_routing_knows_neither_http_nor_engine() -> None:
    """What decides is plain Python, so that it can be tested without either."""
    for path in (ROOT / "server" / "routing").glob("*.py"):
        assert not imported(path) & {"fastapi", "starlette", "torch"}
