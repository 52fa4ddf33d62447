"""`memdec evaluate` on a tiny corpus and two tiny bases, and its parts against obvious computations."""

import json
import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from memdec.cli import main
from memdec.decoders.manifest import fingerprint
from memdec.decoders.models import load_model, save_model
from memdec.decoders.perplexity import label_logprobs, mix, perplexity, scored, windows
from memdec.decoders.pretrain import doubled
from memdec.decoders.reading.passages import Passages, RagOptions
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.study import scores
from memdec.decoders.study.rag import rag_logprobs
from memdec.decoders.study.report import interval, long_tail
from memdec.decoders.study.scores import METHODS
from memdec.decoders.tokens import load_tokens

pytestmark = pytest.mark.slow

STUDY = """
general = "corpus"
work = "study"
[bases.S]
path = "base"
dapt_tokens = 8192
lora_tokens = 4096
[bases.M]
path = "larger"
dapt_tokens = 4096
lora_tokens = 4096
own_keys = false
rag = false
[budget]
valid_windows = 6
test_windows = 8
general_windows = 2
rag_tuning_windows = 1
latency_tokens = 2
[build]
teacher_tokens = 8192
entries = 4000
neighbours = 8
student_tokens = 6144
knn_tokens = 4096
[domains.tiny]
corpus = "corpus"
work = "tiny"
prompts = ["def f("]
"""


@pytest.fixture(scope="module")
def study(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with study.toml, carried out into results/."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "corpus").mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    for split, names in {"train": ("argparse", "typing"), "valid": ("tarfile",), "test": ("ast",)}.items():
        text = "\n\n".join((library / f"{n}.py").read_text().replace("\n\n", "\n") for n in names)
        (folder / "corpus" / f"{split}.txt").write_text(text)
    shutil.copytree(toys / "base", folder / "base")
    larger, small = doubled(load_model(toys / "base")), load_model(toys / "base")
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(larger(tokens).logits, small(tokens).logits)
    save_model(larger, folder / "larger", load_tokenizer(toys / "base"), torch.float32)
    (folder / "study.toml").write_text(STUDY)
    assert main(["evaluate", str(folder / "study.toml"), "--out", str(folder / "results")]) == 0
    return folder


def test_every_method_is_in_the_table(study: Path) -> None:
    """With its interval, bytes, milliseconds and what was tuned; beside both bases."""
    results = json.loads((study / "results" / "results.json").read_text())
    small, large = results["results"]
    assert list(small["methods"]) == list(METHODS)
    assert "knn" not in large["methods"] and "knn_teacher" in large["methods"]
    for row in (small, large):
        for figures in row["methods"].values():
            low, high = figures["interval"]
            assert low <= figures["perplexity"] <= high
            assert figures["milliseconds"] > 0 and figures["bytes"] > 0 and figures["general"] > 1
        assert len(row["long_tail"]["named"]) == 10
        # On the split it is tuned on nothing tuned can lose; on test hardly.
        assert row["methods"]["decoder"]["perplexity"] < row["methods"]["base"]["perplexity"]
        assert row["recall"]["knn_teacher"] == 1.0
    (texts,) = small["continuations"]
    assert texts.keys() == {"prompt", *METHODS} - {"rag", "knn"} and all(texts.values())
    table = (study / "results" / "table.md").read_text()
    assert all(name in table for name in METHODS.values())
    assert {p.name for p in (study / "results").glob("*.png")} == {"perplexity-S.png", "perplexity-M.png", "compression.png"}


FINISHED = """
general = "corpus"
work = "study"
[bases.S]
path = "base"
dapt_tokens = 4096
lora_tokens = 0
rag = false
[budget]
valid_windows = 6
test_windows = 8
general_windows = 2
latency_tokens = 2
[build]
teacher_tokens = 4096
entries = 4000
[domains.tiny]
corpus = "corpus"
work = "finished"
decoder = "tiny/decoder"
prompts = ["def f("]
"""


def test_a_finished_decoder_needs_no_build(study: Path) -> None:
    """It is compared with all that can be made without one, with the figures that it had before."""
    (study / "finished.toml").write_text(FINISHED)
    assert main(["evaluate", str(study / "finished.toml"), "--out", str(study / "again")]) == 0
    (row,) = json.loads((study / "again" / "results.json").read_text())["results"]
    assert list(row["methods"]) == ["base", "knn", "dapt", "decoder"]
    before = json.loads((study / "results" / "results.json").read_text())["results"][0]
    for method in ("base", "knn", "decoder"):
        assert row["methods"][method]["perplexity"] == before["methods"][method]["perplexity"]
    assert not (study / "finished" / "decoder").exists()


def test_the_tables_mixture_is_the_papers(study: Path) -> None:
    """Recomputed from the models."""
    row = json.loads((study / "results" / "results.json").read_text())["results"][0]
    ids = load_tokens(study / "tiny" / "tokens", "test")
    starts = windows(len(ids), 8)
    base, memory = (label_logprobs(load_model(study / f), ids, f, starts) for f in ("base", "tiny/decoder"))
    lam = row["methods"]["decoder"]["tuned"]["lambda"]
    assert perplexity(mix(base, memory, lam)) == pytest.approx(row["methods"]["decoder"]["perplexity"], abs=1e-3)
    assert perplexity(base) == pytest.approx(row["methods"]["base"]["perplexity"], abs=1e-3)


def test_a_second_run_trains_and_scores_nothing(study: Path) -> None:
    """All is fresh; only the report is written again."""
    before = {p: p.stat().st_mtime_ns for p in (study / "tiny").rglob("*") if p.is_file()}
    assert main(["evaluate", str(study / "study.toml"), "--out", str(study / "results")]) == 0
    assert {p: p.stat().st_mtime_ns for p in (study / "tiny").rglob("*") if p.is_file()} == before


def test_scores_of_another_grid_are_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever scores are tuned over is in their manifest, as JSON gives it back."""
    before = fingerprint(scores.grids())
    assert fingerprint(json.loads(json.dumps(scores.grids()))) == before
    for name, value in (("NEIGHBOURS", (16,)), ("PROBED", 8), ("CHOICES", ()), ("TAUS", (1.0,)), ("LAMBDAS", (0.5,))):
        with monkeypatch.context() as changed:
            changed.setattr(scores, name, value)
            assert fingerprint(scores.grids()) != before


def test_rag_scores_equal_one_token_at_a_time(study: Path) -> None:
    """The passage in front of everything before the stride; each token from a pass of its own."""
    model, tokenizer = load_model(study / "base"), load_tokenizer(study / "base")
    train, ids = (load_tokens(study / "tiny" / "tokens", split) for split in ("train", "test"))
    passages, how = Passages.build(train, tokenizer, 64), RagOptions(64, 16, 32)
    ours = rag_logprobs(model, passages, ids, [256], how, "rag")
    assert passages.best([np.array(tokenizer("()=+-*/")["input_ids"])]).shape == (1, 64)  # no word to search for
    places = scored([256])
    for at in (0, 31, 32, 255):
        first = places[at // 32 * 32]
        passage = passages.best([ids[first - 16 : first]])[0]
        before = torch.from_numpy(np.concatenate([passage, ids[256 : places[at]]]).astype(np.int64))[None]
        with torch.inference_mode():
            expected = model(before).logits[0, -1].log_softmax(-1)[int(ids[places[at]])].item()
        assert ours[at] == pytest.approx(expected, abs=0.05)  # bfloat16 where that is fast


def test_the_interval_resamples_documents() -> None:
    """Equal documents leave no doubt; unequal ones do."""
    documents = np.repeat(np.arange(10), 20)
    low, high = interval(np.full(200, -2.0), documents)
    assert low == pytest.approx(high) == pytest.approx(np.exp(2))
    low, high = interval(np.repeat(np.linspace(-4, -1, 10), 20), documents)
    assert low < np.exp(2.5) < high


def test_the_long_tail_is_the_rarest_tenth_of_what_was_seen(toys: Path) -> None:
    """Tokens that never occur in the training text don't count."""
    labels = np.array([300 + i % 100 for i in range(200)])
    counts = np.arange(1000) - 300
    counts[counts < 0] = 0
    rows = {"base": np.full(200, -5.0), "decoder": np.full(200, -4.0)}
    found = long_tail(rows, labels, counts, load_tokenizer(toys / "base"))
    assert found["tokens"] == 19 and found["at_most"] == 10
    assert found["gain"]["decoder"] == pytest.approx(np.e, abs=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('path = "base"', 'path = "nowhere"', "bases.S.path"),
        ("valid_windows = 6", "valid_windows = 0", "budget.valid_windows: 0: wanted a whole number above 0"),
        ("valid_windows = 6", 'valid_windows = "6"', "budget.valid_windows: '6': wanted int"),
        ("entries = 4000", "entrys = 4000", "unknown key 'entrys'"),
        ('general = "corpus"', "", "general: wanted a path"),
        ("[domains.tiny]", "[domains.tiny", "not TOML"),
        ('prompts = ["def f("]', 'bases = ["L"]', "domains.tiny.bases: ['L']: wanted a list of S, M"),
        ('["def f("]', "3", "domains.tiny.prompts: 3: wanted a list of texts"),
        ('work = "tiny"', "", "domains.tiny: wanted corpus and work"),
    ],
)
def test_descriptions_that_cannot_work(study: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the key."""
    assert old in STUDY
    broken = study / f"broken-{os.getpid()}.toml"
    broken.write_text(STUDY.replace(old, new, 1))
    assert main(["evaluate", str(broken), "--out", str(study / "out")]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("memdec: error: ") and message in told
    assert not (study / "out").exists()
