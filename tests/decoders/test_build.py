"""The six stages on a tiny base and corpus, as a user would run them, and the package they leave."""

import json
import resource
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from decoders.package import Package
from server.cli import main

TINY = ["--teacher-tokens", "8192", "--entries", "4000", "--neighbours", "8", "--text-tokens", "16384", "--knn-tokens", "8192"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ready-made splits, from the standard library's own files."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    for split, names in {"train": ("argparse", "typing", "inspect"), "valid": ("tarfile",), "test": ("zipfile/__init__", "ast")}.items():
        found = [library / f"{n}.py" for n in names if (library / f"{n}.py").is_file()]
        (folder / f"{split}.txt").write_text("\n\n".join(f.read_text().replace("\n\n", "\n") for f in found))
    return folder


def build(corpus: Path, base: Path, out: Path, largest: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """`memdec build` in a process of its own, whose files may have at most `largest` bytes."""
    command = [sys.executable, "-m", "server.cli", "build", "tiny", "--corpus", str(corpus), "--base", str(base), "--out", str(out), *TINY]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))  # noqa: E731
    return subprocess.run(command, capture_output=True, text=True, timeout=900, preexec_fn=limit)


@pytest.fixture(scope="module")
def built(corpus: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package made by the real command."""
    out = tmp_path_factory.mktemp("built") / "tiny"
    done = build(corpus, toys / "base", out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_package_is_complete(built: Path, toys: Path) -> None:
    """An ordinary Hugging Face folder with its record: lambda, hash, provenance, figures."""
    package = Package.open(built, toys / "base")
    assert package.domain == "tiny"
    assert package.tuned
    assert 0 <= package.lam <= 1
    assert package.perplexity["mixture"] <= package.perplexity["base"] * 1.001
    record = json.loads((built / "memory_decoder.json").read_text())
    assert {"corpus", "options", "seconds", "versions"} <= record["training"].keys()


def test_a_second_run_keeps_every_stage(built: Path, corpus: Path, toys: Path) -> None:
    """Nothing changed, nothing is done again."""
    before = {p: p.stat().st_mtime_ns for p in built.parent.rglob("*") if p.is_file()}
    done = build(corpus, toys / "base", built)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in built.parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("largest", [20_000, 1_200_000])
def test_files_that_cannot_be_written_are_one_line(largest: int, built: Path, corpus: Path, toys: Path, tmp_path: Path) -> None:
    """A disk that fills up at the tokens, or at the teacher; no traceback and nothing half-written."""
    done = build(corpus, toys / "base", tmp_path / "out", largest)
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stderr.strip().splitlines()[-1].startswith("memdec: error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_too_little_text_is_refused_by_name(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and no package."""
    folder = tmp_path / "small"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("too short\n")
    code = main(["build", "x", "--corpus", str(folder), "--base", str(toys / "base"), "--out", str(tmp_path / "out")])
    assert code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("memdec: error: corpus small: split train has")
    assert not (tmp_path / "out").exists()


def test_options_and_bases_that_cannot_work(toys: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each names the key, the value and what is wanted."""
    arguments = ["build", "x", "--corpus", str(corpus), "--out", str(tmp_path / "out"), "--base"]
    assert main(["build", "a b/c", *arguments[2:], str(toys / "base")]) == 1
    assert "NAME 'a b/c': wanted" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--beta", "1.5"]) == 1
    assert "--beta 1.5: wanted" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--entries", "0"]) == 1
    assert "--entries 0: wanted" in capsys.readouterr().err
    broken = Path(shutil.copytree(toys / "base", tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"nonsense")
    assert main([*arguments, str(broken)]) == 1
    assert "safetensors" in capsys.readouterr().err
