"""Packages that leave out what their base has: they are completed to the very bytes that were left out, and to nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memdec.cli import main
from memdec.decoders.models import load_model, save_model
from memdec.decoders.package import write_package
from memdec.decoders.reading import shared_tensors
from memdec.decoders.reading.errors import DecoderError, ManifestError, PackageError
from memdec.decoders.reading.names import RECORD
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.shared_tensors import WEIGHTS, completed
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.reading.weights import fingerprint_model
from memdec.server.checked_models import check_models

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def whole(toys: Path, tmp_path: Path) -> Path:
    """A decoder with all its tensors: the base's embeddings, and layers of its own."""
    model = load_model(toys / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name:
                weight += 0.01
    save_model(model, tmp_path / "whole", load_tokenizer(toys / "base"), torch.float32)
    return tmp_path / "whole"


@pytest.fixture
def package(whole: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as a package."""
    monkeypatch.setattr(shared_tensors, "LEAST", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    figures = {"name": "base", "lambda": 0.3, "base": 20.0, "memory": 30.0, "mixture": 15.0, "tokens": 100, "window": 512}
    training = {"corpus": {"name": "text", "fingerprint": "f", "licence": "none"}, "options": {}, "seconds": {}, "versions": {}}
    return write_package(tmp_path / "a", whole, "a", {fingerprint_model(toys / "base"): figures}, training, toys / "base", {})


def test_what_the_base_has_is_left_out_and_comes_back(package: Path, whole: Path, toys: Path, tmp_path: Path) -> None:
    """Bit for bit, in a folder that transformers and the server load; made once."""
    assert EMBEDDINGS not in load_file(package / WEIGHTS) and EMBEDDINGS in Package.read(package).record.shared
    assert main(["standalone", str(package), "--base", str(toys / "base"), "--out", str(tmp_path / "out")]) == 0
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(whole / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Package.open(tmp_path / "out", toys / "base").lam == 0.3 and json.loads((tmp_path / "out" / RECORD).read_text())["format"] == 1

    (domain,) = check_models(str(toys / "base"), [f"a={package}"]).domains
    assert domain.lam == 0.3 and domain.tuned and domain.revision == Package.read(tmp_path / "out").revision
    made = Path(domain.path, WEIGHTS).stat().st_ino
    assert check_models(str(toys / "base"), [f"a={package}"]).domains.all == (domain,)
    assert Path(domain.path, WEIGHTS).stat().st_ino == made
    assert load_model(domain.path)(torch.tensor([[5, 6]])).logits.equal(load_model(whole)(torch.tensor([[5, 6]])).logits)


def test_verify_wants_the_base(package: Path, toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it nobody knows the tensors."""
    assert main(["verify", str(package), "--base", str(toys / "base")]) == 0
    assert "can be served" in capsys.readouterr().out
    assert main(["verify", str(package)]) == 1
    assert "--base" in capsys.readouterr().err


def test_another_base_is_refused(package: Path, toys: Path, tmp_path: Path) -> None:
    """With the tensor's name, and what to do; also where the package was completed before."""
    other = Path(shutil.copytree(toys / "base", tmp_path / "other"))
    weights = load_file(other / WEIGHTS)
    weights[EMBEDDINGS][0, 0] += 1
    save_file(weights, other / WEIGHTS, {"format": "pt"})
    completed(Package.read(package), toys / "base", tmp_path / "cache")
    for attempt in (
        lambda: completed(Package.read(package), other, tmp_path / "cache"),
        lambda: check_models(str(other), [f"a={package}"]),
    ):
        with pytest.raises(Exception, match=rf"{EMBEDDINGS}.*memdec standalone") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_nothing_is_overwritten_and_nothing_half_made(package: Path, toys: Path, tmp_path: Path) -> None:
    """A folder that is there, and a disk that can't be written."""
    with pytest.raises(ManifestError, match="already"):
        shared_tensors.write_standalone(Package.read(package), toys / "base", tmp_path / "whole")
    (tmp_path / "file").touch()
    with pytest.raises(ManifestError, match="nothing was written"):
        shared_tensors.write_standalone(Package.read(package), toys / "base", tmp_path / "file" / "out")
    shared_tensors.write_standalone(Package.read(package), toys / "base", tmp_path / "out")
    with pytest.raises(PackageError, match="complete already"):
        shared_tensors.write_standalone(Package.read(tmp_path / "out"), toys / "base", tmp_path / "again")
    assert not (tmp_path / "again").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"format": 1}, "format 2"),
        ({"format": 3}, "reads 1 and 2"),
        ({"shared": {EMBEDDINGS: {"tensor": EMBEDDINGS}}}, "sha256 is missing"),
    ],
)
def test_damaged_records(change: dict[str, object], wanted: str, package: Path) -> None:
    """One line that names the key."""
    (package / RECORD).write_text(json.dumps(json.loads((package / RECORD).read_text()) | change))
    with pytest.raises(DecoderError, match=wanted):
        Package.read(package)
