"""The embedded models: their sizes, and that each memory is worth having."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from memdec.decoders.corpus import Corpus
from memdec.decoders.models import load_model
from memdec.decoders.perplexity import label_logprobs, mix, perplexity
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.reading.weights import safetensors_header
from memdec.server.checked_models import check_models

pytestmark = pytest.mark.slow

ZOO = ROOT / "decoders" / "zoo"
DOMAINS = ("biomed", "finance", "law", "python")


def parameters(folder: Path) -> int:
    """Weights in a folder's safetensors files."""
    _, header = safetensors_header(folder / "model.safetensors")
    return sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")


def test_sizes() -> None:
    """A base of 10 to 20 M parameters; decoders of one shape, at most 0.4 of it; small files."""
    base = parameters(ZOO / "base")
    assert 10e6 <= base <= 20e6
    assert sum(f.stat().st_size for f in (ZOO / "base").iterdir()) <= 40e6
    for domain in DOMAINS:
        assert parameters(ZOO / domain) <= min(6e6, 0.4 * base)
        assert sum(f.stat().st_size for f in (ZOO / domain).iterdir()) <= 12e6


@pytest.mark.parametrize("base", ["base", "base-m"])
def test_all_domains_can_be_served_together(base: str) -> None:
    """Same tokenizer and shape, tuned beside this base."""
    models = check_models(str(ZOO / base), [f"{d}={ZOO / d}" for d in DOMAINS])
    assert all(d.tuned for d in models.domains)
    assert sum(f.stat().st_size for f in (ZOO / base).iterdir()) <= 60e6


@pytest.mark.parametrize("domain", DOMAINS)
def test_recorded_perplexities(domain: str) -> None:
    """On the test split the mixture beats the base, and the memory alone."""
    figures = Package.open(ZOO / domain, ZOO / "base").perplexity
    assert figures["mixture"] < 0.8 * figures["base"]
    assert figures["mixture"] <= figures["memory"]
    assert json.loads((ZOO / domain / "memory_decoder.json").read_text())["domain"] == domain
    card = (ZOO / domain / "README.md").read_text()
    assert f"# {domain}: a memory decoder" in card and str(figures["mixture"]) in card
    assert f"**{figures['mixture']:.1f}**" in (ZOO / "README.md").read_text()


def test_the_python_memory_helps_on_held_out_code() -> None:
    """Measured here: the one corpus that every machine has."""
    package = Package.open(ZOO / "python", ZOO / "base")
    tokenizer = load_tokenizer(ZOO / "base")
    text = "\n".join(list(Corpus.open("stdlib").documents("test"))[:8])[:60_000]
    ids = np.array(tokenizer(text)["input_ids"][:8000], np.uint16)
    base, memory = (label_logprobs(load_model(ZOO / name), ids, name) for name in ("base", "python"))
    assert perplexity(mix(base, memory, package.lam)) < 0.8 * perplexity(base)
