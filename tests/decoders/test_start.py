"""Students that start from a pretrained model: layers, frozen embeddings, a vocabulary of the domain's own, the loss of the mixture."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import gpt, qwen

from memdec.cli import main
from memdec.decoders.base_labels import write_base_labels
from memdec.decoders.build_options import BuildOptions
from memdec.decoders.head import Head
from memdec.decoders.loss import CHUNK, mixture_loss
from memdec.decoders.models import OUTSIDE, load_model, save_model
from memdec.decoders.objectives import Imitation, Mixture
from memdec.decoders.perplexity import figures
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.reading.weights import scan
from memdec.decoders.start import chosen_layers, freeze_embeddings, restrict, with_layers
from memdec.decoders.train import Schedule, _optimizers, train


def test_layers_by_number_and_by_count() -> None:
    """A count means the first ones and the last."""
    assert chosen_layers("all", 3) == [0, 1, 2]
    assert chosen_layers("0,1,2,29", 30) == [0, 1, 2, 29]
    assert chosen_layers("4", 30) == [0, 1, 2, 29]
    assert chosen_layers("1", 30) == [29]
    for wrong in ("0", "31", "1,1", "2,1", "0,30", "-1", "a", "", "0,"):
        with pytest.raises(OptionError, match=r"--init-layers .*: wanted all, different numbers from 0 to 29"):
            chosen_layers(wrong, 30)


@pytest.mark.parametrize("kind", ["qwen", "gpt"])
def test_a_student_of_some_layers_computes_what_those_compute(kind: str) -> None:
    """The whole model with the other layers taken out by hand."""
    whole = qwen(1, 64, hidden=32, layers=3, heads=2, spread=0.2).eval() if kind == "qwen" else gpt(1).eval()
    numbers = [0, whole.config.num_hidden_layers - 1]
    part = with_layers(whole, ",".join(map(str, numbers)))
    ids = torch.arange(20)[None]
    ours = part(ids, use_cache=False).logits
    stack = whole.model if kind == "qwen" else whole.transformer
    name = "layers" if kind == "qwen" else "h"
    setattr(stack, name, torch.nn.ModuleList([getattr(stack, name)[n] for n in numbers]))
    whole.config.num_hidden_layers = 2
    torch.testing.assert_close(ours, whole(ids, use_cache=False).logits)


def test_the_bases_embeddings_are_not_trained_and_stay_as_they_are(toys: Path, tmp_path: Path) -> None:
    """Another model's are. And the tokens that are ruled out stay so, through saving, loading and training."""
    own, ids = with_layers(load_model(toys / "base"), "2"), np.tile(np.arange(300, dtype=np.uint16), 40)
    restrict(own, ids[:2000], 7)
    freeze_embeddings(own, toys / "base")
    before = own.get_input_embeddings().weight.clone()
    train(own, ids, Schedule(768, window=64, batch=4, matrix_lr=0.0, stretched=0.0), "x")
    assert torch.equal(own.get_input_embeddings().weight, before)
    save_model(own, tmp_path, load_tokenizer(toys / "base"), torch.bfloat16)
    scan(tmp_path)
    loaded = load_model(tmp_path)
    probabilities = loaded(torch.arange(50)[None], use_cache=False).logits.softmax(-1)
    counts = torch.from_numpy(np.bincount(ids[:2000], minlength=probabilities.shape[-1]))
    assert (probabilities[..., counts < 7] == 0).all() and (probabilities[..., counts >= 7] > 0).all()

    other = load_model(toys / "qwen_a")
    freeze_embeddings(other, toys / "base")
    assert all(p.requires_grad for p in other.parameters())


def test_a_restricted_head_gives_the_same_loss_and_gradients() -> None:
    """Against the full head, whose bias rules out the same tokens; targets outside are left out, the rest made whole."""
    model = qwen(1, 64, hidden=32, layers=1, heads=2, spread=0.2).eval()
    restrict(model, np.repeat(np.arange(64, dtype=np.uint16), np.arange(64)), 20)
    full = Head.of(model)
    assert full.bias is not None and (full.bias == OUTSIDE).sum() == 20
    hidden, labels = torch.randn(48, 32, requires_grad=True), torch.randint(0, 64, (3, 16))
    knn = torch.tensor([[30, 5]]).expand(48, 2)  # the second is outside
    targets = lambda _starts, labels: (torch.cat([labels.reshape(-1, 1), knn], 1), torch.tensor([[0.5, 0.3, 0.2]]).expand(48, 3))  # noqa: E731
    starts, flat = np.zeros(3, np.int64), labels.reshape(-1)
    rows = full.logits(hidden).log_softmax(-1)
    ours = Imitation(targets)(full.restricted(), hidden, starts, labels, torch.float32)
    inside = (flat >= 20).float()
    picked = torch.where(flat >= 20, flat, 30)
    slow = -((0.5 * inside * rows.gather(1, picked[:, None])[:, 0] + 0.3 * rows[:, 30]) / (0.3 + 0.5 * inside)).mean()
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (ours, slow)), atol=1e-6, rtol=1e-4)

    base = np.log(np.random.default_rng(0).uniform(0.01, 1, 16)).astype(np.float32)
    mixed = Mixture(base, 0.3)(full.restricted(), hidden, starts, labels, torch.float32)
    label = rows.gather(1, picked[:, None])[:, 0].exp()
    both = -(0.3 * label + 0.7 * torch.from_numpy(np.tile(base, 3)).exp()).log()
    torch.testing.assert_close(mixed, (both * inside).sum() / inside.sum())


def test_loss_of_the_mixture_against_dense_autograd() -> None:
    """Over more rows than a chunk, gradients of the weight included; of no rows it is 0."""
    rows = CHUNK + 7
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels, base = torch.randint(0, 50, (rows,)), torch.rand(rows).log()
    p = (hidden @ weight.T).softmax(-1).gather(1, labels[:, None])[:, 0]
    slow, fast = -(0.4 * p + 0.6 * base.exp()).log().mean(), mixture_loss(hidden, weight, labels, base, 0.4)
    torch.testing.assert_close(fast, slow)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (fast, slow)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert mixture_loss(hidden[:0], weight, labels[:0], base[:0], 0.4) == 0


def test_a_learnt_table_of_positions_is_no_matrix() -> None:
    """AdamW trains it, as the other embeddings; with a matrix rate of 0, everything."""
    model = gpt(1)
    muon, adam = _optimizers(model, Schedule(1))
    tables = {id(model.transformer.wpe.weight), id(model.transformer.wte.weight)}
    assert tables <= {id(p) for group in adam.param_groups for p in group["params"]}
    assert not tables & {id(p) for group in muon.param_groups for p in group["params"]}
    assert len(_optimizers(model, Schedule(1, matrix_lr=0.0))) == 1


def test_base_labels_are_the_bases_own_probabilities(toys: Path, tmp_path: Path) -> None:
    """Each with at least 128 tokens of context, or all there are."""
    ids = np.random.default_rng(0).integers(0, 900, 1500).astype(np.uint16)
    (tmp_path / "tokens").mkdir()
    np.save(tmp_path / "tokens" / "train.npy", ids)
    made = write_base_labels(tmp_path / "labels", tmp_path / "tokens", toys / "base", 5000, {"x": 1})
    logprobs, tokens = np.load(made / "logprobs.npy"), np.load(made / "tokens.npy")
    assert len(tokens) == 1500 and len(logprobs) == 1499
    whole = load_model(toys / "base")(torch.from_numpy(ids[:512].astype(np.int64))[None], use_cache=False).logits[0].log_softmax(-1)
    wanted = whole[:511].gather(1, torch.from_numpy(ids[1:512].astype(np.int64))[:, None])[:, 0].detach().numpy()
    np.testing.assert_allclose(logprobs[:511], wanted, atol=1e-3)


def test_figures_of_a_memory_with_a_vocabulary_of_its_own() -> None:
    """Its own perplexity is on the tokens that it can predict; the mixture's is on all."""
    base, memory = np.log(np.full(4, 0.25)), np.array([math.log(0.5)] * 3 + [OUTSIDE])
    found = figures(base, memory, 0.5)
    assert found["memory"] == 2 and found["base"] == 4 and found["covered"] == 0.75
    assert found["mixture"] == pytest.approx(math.exp(-(3 * math.log(0.375) + math.log(0.125)) / 4), abs=1e-3)
    assert "covered" not in figures(base, base, 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--loss", "dpo"], "--loss dpo: wanted knn or mixture or labels"),
        (["--loss", "labels", "--entries", "9000"], "--entries 9000: would have no effect; --loss labels takes all"),
        (["--mixture-lambda", "0.2"], "--mixture-lambda 0.2: would have no effect; only --loss mixture has it"),
        (["--loss", "mixture", "--mixture-lambda", "1"], "--mixture-lambda 1.0: wanted a number between 0 and 1"),
        (["--loss", "mixture", "--beta", "0.3"], "--beta 0.3: would have no effect; --loss mixture has no datastore"),
        (["--loss", "mixture", "--teacher", "BASE"], "would have no effect; --loss mixture has no datastore"),
        (["--init-layers", "2"], "--init-layers 2: would have no effect; the decoder has fresh weights without --init"),
        (["--min-count", "16"], "--min-count 16: would have no effect"),
        (["--learning-rate", "nan", "--init", "BASE"], "--learning-rate nan: wanted a number above 0, up to 1"),
        (["--min-count", "-1", "--init", "BASE"], "--min-count -1: wanted a whole number, 0 or above"),
        (["--init", "nowhere"], "--init nowhere: no such folder"),
        (["--init", "BASE", "--init-layers", "0,7"], "--init-layers 0,7: wanted all, different numbers from 0 to 2"),
    ],
)
def test_options_that_cannot_work(options: list[str], said: str, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, before anything is made."""
    words = [str(toys / "base") if word == "BASE" else word for word in options]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a\n")
    line = ["build", "x", "--corpus", str(tmp_path / "text"), "--base", str(toys / "base"), "--out", str(tmp_path / "out"), *words]
    assert main(line) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_stage_that_the_build_lacks_is_refused(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A build for the mixture has no datastore to stop at."""
    (tmp_path / "a.txt").write_text("a\n")
    line = ["datastore", "x", "--corpus", str(tmp_path), "--base", str(toys / "base"), "--out", str(tmp_path / "out"), "--loss", "mixture"]
    assert main(line) == 1
    assert "--loss mixture: a build with it has no stage datastore" in capsys.readouterr().err


def test_defaults_keep_their_schedules() -> None:
    """What was built before stays fresh: the schedules are part of what decides that."""
    options = BuildOptions()
    assert options.student_schedule(False) == Schedule(3_000_000, batch=4, cooldown=0.2)
    assert options.knn_schedule(False) == Schedule(1_500_000, batch=8, seed=1, cooldown=0.9)
