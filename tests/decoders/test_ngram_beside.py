"""`memdec ngram --beside`: the fit of three weights, and the command as a user runs it."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from ngram_package import build_package, write_corpus

from memdec.cli import main
from memdec.decoders.ngram_beside import best_weights, fit_together
from memdec.decoders.perplexity import Floats
from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.weights import fingerprint_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ready-made splits, from the standard library's own files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(corpus: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package made by the command."""
    return build_package(corpus, toys, tmp_path_factory.mktemp("built") / "code")


RANDOM = np.random.default_rng(5)
TOKENS = 4000


def text(decoder: float, ngram: float) -> tuple[Floats, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """What three models say of tokens that each knows some of, the n-gram memory the more the longer its match; and which ones are fitted on."""
    matched = RANDOM.integers(0, 8, TOKENS)
    knows = RANDOM.random((TOKENS, 3)) < np.stack([np.full(TOKENS, 0.3), np.full(TOKENS, decoder), ngram * matched / 7], 1)
    parts = np.where(knows, 0.6, 0.01)
    parts[matched == 0, 2] = parts[matched == 0, 0]
    return parts, matched, np.arange(TOKENS) % 2 == 0


def test_the_weights_are_the_best() -> None:
    """As a search over all of them, in steps of 0.05, finds them."""
    parts, _, _ = text(0.5, 0.7)

    def loss(pair: tuple[float, float]) -> float:
        return -float(np.log(np.maximum(1 - sum(pair), 0) * parts[:, 0] + parts[:, 1:] @ np.array(pair)).mean())

    steps = np.linspace(0, 1, 21)
    tried = min(((d, n) for d, n in product(steps, steps) if d + n <= 1), key=loss)
    found = best_weights(parts, (1, 2))
    assert np.abs(found - np.array(tried)).max() <= 0.05 and loss((found[0], found[1])) <= loss(tried) + 1e-9
    assert best_weights(parts, (2,))[0] == 0.0 and best_weights(parts, ()).tolist() == [0.0, 0.0]


def test_two_memories_that_know_different_things_are_better_together() -> None:
    """The n-gram memory has more of lambda the longer the match, and nothing without one; the pairs are what a record takes."""
    found = fit_together(*text(0.5, 0.9))
    assert found.better and found.perplexity["both"] < min(found.perplexity["decoder"], found.perplexity["ngram"])
    assert found.weights[7, 1] > found.weights[3, 1] > found.weights[1, 1] > found.weights[0, 1] == 0
    entry = found.to_json()
    assert all(0 <= share <= 1 for pair in entry["shares"] for share in pair) and all(sum(pair) <= 1 for pair in entry["shares"])
    assert max(sum(pair) for pair in entry["shares"]) == pytest.approx(1, abs=2e-4) and entry["better"] is True
    weights = entry["lambda"] * np.array(entry["shares"])
    assert np.abs(weights - found.weights).max() < 5e-4


@pytest.mark.parametrize(("decoder", "ngram"), [(0.0, 0.9), (0.6, 0.0)])
def test_a_memory_that_knows_nothing_adds_nothing(decoder: float, ngram: float) -> None:
    """Then the two together are not said to be better."""
    parts, matched, fitting = text(decoder, ngram)
    parts[:, 1 if not decoder else 2] = parts[:, 0]
    assert not fit_together(parts, matched, fitting).better


def test_the_command(built: Path, toys: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The package says of exactly this decoder and base what was measured, and is otherwise what it was; again, and after a document is gone."""
    out = tmp_path / "code"
    shutil.copytree(built, out)
    before = NgramMemory.open(out)
    words = ["ngram", "code", "--out", str(out), "--corpus", str(corpus), "--base", str(toys / "base"), "--windows", "4"]
    for _ in range(2):
        assert main([*words, "--beside", str(toys / "qwen_a")]) == 0
    (entry,) = NgramMemory.open(out).record.beside
    assert (entry.decoder, entry.base) == (Package.open(toys / "qwen_a").revision, fingerprint_model(toys / "base"))
    assert list(entry.perplexity) == ["base", "decoder", "ngram", "both"] and entry.perplexity["ngram"] < entry.perplexity["base"]
    assert str(entry.perplexity["both"]) in capsys.readouterr().out and entry.decoder in (out / "README.md").read_text()
    assert NgramMemory.open(out).revision == before.revision
    assert main([*words, "--beside", str(toys / "gpt_a")]) == 0
    assert [one.decoder for one in NgramMemory.open(out).record.beside] == [entry.decoder, Package.open(toys / "gpt_a").revision]
    document = json.loads((out / "shard-0" / "documents.json").read_text())["documents"][0]
    assert main(["ngram", "code", "--out", str(out), "--remove", document]) == 0
    kept = NgramMemory.open(out).record.beside[0]
    assert kept.shares == entry.shares and kept.better == entry.better and not kept.perplexity


def test_bad_commands_are_one_line_each(
    built: Path,
    toys: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 1, a message that names what is wrong, and a package that is as it was."""
    out, other, foreign = tmp_path / "code", tmp_path / "other", tmp_path / "foreign"
    shutil.copytree(built, out)
    record = (out / "ngram.json").read_bytes()
    shutil.copytree(corpus, other)
    next((other / "train").iterdir()).write_text("def other(self):\n    return 1\n" * 40)
    shutil.copytree(toys / "qwen_a", foreign)
    vocabulary = json.loads((foreign / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    a, b = list(tokens)[300:302]
    tokens[a], tokens[b] = tokens[b], tokens[a]
    (foreign / "tokenizer.json").write_text(json.dumps(vocabulary))
    at, source, beside = ["--out", str(out)], ["--corpus", str(corpus), "--base", str(toys / "base")], ["--beside", str(toys / "qwen_a")]
    for words, wanted in (
        (["code", *at, *beside], "--corpus: is missing"),
        (["code", *at, *source, *beside, "--with-sources"], "--with-sources: has no effect beside --beside"),
        (["code", *at, *source, *beside, "--windows", "1"], "wanted 2 or more"),
        (["other", *at, *source, *beside], "is of 'code'"),
        (["code", *at, *source, "--beside", str(tmp_path / "nowhere")], "nowhere"),
        (["code", *at, *source, "--beside", str(foreign)], "--beside"),
        (["code", *at, "--corpus", str(other), "--base", str(toys / "base"), *beside], "made from other text"),
        (["code", "--out", str(tmp_path / "none"), *source, *beside], "no such folder"),
    ):
        assert main(["ngram", *words, *(["--work", str(tmp_path / "work" / words[0])] if source[0] in words else [])]) == 1, words
        error = capsys.readouterr().err
        assert wanted in error and "Traceback" not in error, (wanted, error)
        assert len([line for line in error.splitlines() if line.startswith("memdec: error")]) == 1
    assert (out / "ngram.json").read_bytes() == record


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"shares": [[0.6, 0.6]] * 8}, "pairs of numbers"),
        ({"shares": [[0.5, 0.5]] * 7}, "pairs of numbers"),
        ({"lambda": 2}, "lambda is 2"),
        ({"shared": 1}, "shared is no key"),
        ({"better": "yes"}, "better"),
    ],
)
def test_a_damaged_record(built: Path, tmp_path: Path, changed: dict[str, object], wanted: str) -> None:
    """One line that names the key and what is wanted."""
    shutil.copytree(built, tmp_path / "code")
    fields = json.loads((tmp_path / "code" / "ngram.json").read_text())
    entry = {"decoder": "d" * 16, "base": "b" * 16, "lambda": 0.5, "shares": [[0.5, 0.5]] * 8, "better": True}
    fields["beside"] = [{**entry, **changed}]
    (tmp_path / "code" / "ngram.json").write_text(json.dumps(fields))
    with pytest.raises(PackageError, match=wanted) as caught:
        NgramMemory.open(tmp_path / "code")
    assert "\n" not in str(caught.value)
