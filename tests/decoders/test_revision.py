"""A revision is a hash of all bytes: no two models that answer differently share one."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.names import RECORD
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.weights import fingerprint_model, scan

ROWS = 600  # 4.8 MB: the places that were sampled of old, 16 times 64 KiB, were a fifth of it


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config and weights; no model, but all that a revision is made of."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Toy"], "vocab_size": ROWS}))
    rng = np.random.default_rng(0)
    save_file({n: rng.standard_normal((ROWS, 1000)).astype(np.float32) for n in ("a", "b")}, folder / "model.safetensors")
    return folder


def test_every_byte_counts(model: Path, tmp_path: Path) -> None:
    """One flipped bit, wherever it is: no sample could tell."""
    before = Package.open(model).revision
    assert before == fingerprint_model(model) and len(before) == 32
    weights = (model / "model.safetensors").read_bytes()
    for place in np.random.default_rng(1).integers(1000, len(weights), 8):
        changed = bytearray(weights)
        changed[place] ^= 1
        (model / "model.safetensors").write_bytes(changed)
        found = fingerprint_model(model)
        assert found != before and found == fingerprint_model(Path(shutil.copytree(model, tmp_path / str(place))))
    (model / "model.safetensors").write_bytes(weights)
    assert fingerprint_model(model) == before


def test_signs_between_the_old_samples(model: Path) -> None:
    """The attack as it was: signs turned wherever the old fingerprint didn't look."""
    before = fingerprint_model(model)
    file = model / "model.safetensors"
    size, data = file.stat().st_size, bytearray(file.read_bytes())
    looked = np.zeros(size, bool)
    for i in range(16):
        looked[size * i // 16 :][: 1 << 16] = True
    start = 8 + int.from_bytes(data[:8], "little")
    for byte in range(start + 3, size, 4):
        if not looked[byte]:
            data[byte] ^= 0x80
    file.write_bytes(data)
    assert fingerprint_model(model) != before


def test_config_and_names_count(model: Path) -> None:
    """The config's bytes, and which bytes are in which file."""
    found = {fingerprint_model(model)}
    (model / "config.json").write_text('{"architectures": ["Toy"], "vocab_size": 601}')
    found.add(fingerprint_model(model))
    (model / "model.safetensors").rename(model / "other.safetensors")
    found.add(fingerprint_model(model))
    assert len(found) == 3


def test_digests_are_what_sha256sum_prints(model: Path) -> None:
    """So that anybody can compare them; and hashing with the check for NaN gives what hashing alone gives."""
    scanned = scan(model)
    assert scanned.digests == {"model.safetensors": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()}
    weights = load_file(model / "model.safetensors")
    weights["b"][-1, -1] = np.nan
    save_file(weights, model / "model.safetensors")
    with pytest.raises(PackageError, match="weight b holds NaN or infinity"):
        scan(model)


def test_figures_are_found_by_the_bases_hash(model: Path, tmp_path: Path) -> None:
    """A base of other weights has other figures, or none."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (model / RECORD).write_text(
        json.dumps({"format": 1, "lambda": 0.3, "bases": {fingerprint_model(base): {"lambda": 0.7, "mixture": 9.5}}})
    )
    beside = Package.open(model, base)
    assert (beside.lam, beside.tuned, beside.perplexity) == (0.7, True, {"lambda": 0.7, "mixture": 9.5})
    weights = load_file(base / "model.safetensors")
    weights["a"] *= -1
    save_file(weights, base / "model.safetensors")
    other = Package.open(model, base)
    assert (other.lam, other.tuned, other.perplexity) == (0.3, False, {})
