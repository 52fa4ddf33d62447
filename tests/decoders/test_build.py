"""The stages on a tiny base and corpus, as a user would run them, and the package they leave."""

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from memdec.cli import main
from memdec.decoders.build import Build
from memdec.decoders.corpus import Corpus
from memdec.decoders.manifest import alone, stage
from memdec.decoders.models import load_model, save_model
from memdec.decoders.pretrain import doubled
from memdec.decoders.reading.errors import ManifestError
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

TINY = ["--teacher-tokens", "4096", "--entries", "4000", "--neighbours", "8", "--student-tokens", "6144", "--knn-tokens", "4096"]
TINY += ["--ngram-targets", "0.2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ready-made splits, from the standard library's own files."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    for split, names in {"train": ("argparse", "typing", "inspect"), "valid": ("tarfile",), "test": ("ast",)}.items():
        found = [library / f"{n}.py" for n in names if (library / f"{n}.py").is_file()]
        (folder / f"{split}.txt").write_text("\n\n".join(f.read_text().replace("\n\n", "\n") for f in found))
    return folder


def command(corpus: Path, base: Path, out: Path) -> list[str]:
    """`memdec build`, with the work folder beside `out`."""
    return ["-m", "memdec", "build", "tiny", "--corpus", str(corpus), "--base", str(base), "--out", str(out), *TINY]


def artifacts(work: Path) -> dict[str, str]:
    """Hash of every file that holds data: all but the records of seconds."""
    files = sorted(p for p in work.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(p.relative_to(work)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def build(corpus: Path, base: Path, out: Path, largest: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """`memdec build` in a process of its own, whose files may have at most `largest` bytes."""
    words = [sys.executable, *command(corpus, base, out)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))  # noqa: E731
    return subprocess.run(words, capture_output=True, text=True, timeout=900, preexec_fn=limit)


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


def test_killed_in_every_stage_it_goes_on_to_the_same_artifacts(built: Path, corpus: Path, toys: Path, tmp_path: Path) -> None:
    """SIGKILL a moment after each stage begins; bookmarks are written as often as can be. Then to the end."""
    words = [sys.executable, *command(corpus, toys / "base", tmp_path / "out"), "--checkpoint-every", "0"]
    stages = ("near_duplicates", "tokens", "teacher", "datastore", "knn_targets", "student", "decoder")
    log = (tmp_path / "log.txt").open("w+")
    for number, name in enumerate(stages):
        process = subprocess.Popen(words, stdout=log, stderr=log)
        finished, partial = tmp_path / "out.work" / name, tmp_path / "out.work" / f".{name}.partial"
        while not (partial.exists() or finished.exists()) and process.poll() is None:
            time.sleep(0.01)
        # A little later each time: in some stages before the first bookmark, in some after it.
        time.sleep(0.1 * number)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    log.seek(0)
    assert "going on where an earlier run stopped" in log.read() + done.stdout
    assert artifacts(tmp_path / "out.work") == artifacts(built.with_name("tiny.work"))
    assert artifacts(tmp_path / "out")["model.safetensors"] == artifacts(built)["model.safetensors"]
    assert artifacts(tmp_path / "out.ngram") == artifacts(built.with_name("tiny.ngram"))
    assert not list(tmp_path.rglob(".*"))


STARTED = [
    "--no-ngram",
    "--loss",
    "mixture",
    "--init-layers",
    "0,2",
    "--min-count",
    "4",
    "--validate-every",
    "4096",
    "--student-tokens",
    "16384",
    "--knn-tokens",
    "8192",
]


def test_from_a_pretrained_model_for_the_mixture(corpus: Path, toys: Path, tmp_path: Path) -> None:
    """The base's own layers, its embeddings as they are, a vocabulary of its own; killed in its stages it ends with the same artifacts."""
    started = [*STARTED, "--init", str(toys / "base"), "--entries", "4000"]
    assert main(["build", "tiny", "--corpus", str(corpus), "--base", str(toys / "base"), "--out", str(tmp_path / "a"), *started]) == 0
    assert not (tmp_path / "a.ngram").exists()
    package = Package.open(tmp_path / "a", toys / "base")
    assert package.perplexity["mixture"] <= package.perplexity["base"] * 1.001
    assert 0 < package.perplexity["covered"] < 1
    made, base = load_file(tmp_path / "a" / "model.safetensors"), load_file(toys / "base" / "model.safetensors")
    assert torch.equal(made["model.embed_tokens.weight"], base["model.embed_tokens.weight"].bfloat16())
    curve = [json.loads(line) for line in (tmp_path / "a.work" / "decoder" / "decoder.curve.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in curve] == [4096, 8192]
    assert curve[-1]["mixture"] <= curve[-1]["base"] * 1.001 and curve[-1]["seconds"] >= curve[0]["seconds"]

    words = [*command(corpus, toys / "base", tmp_path / "b")[: -len(TINY)], *started, "--checkpoint-every", "0"]
    for name in ("student", "base_labels", "decoder"):
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finished, partial = tmp_path / "b.work" / name, tmp_path / "b.work" / f".{name}.partial"
        while not (list(partial.glob("*.bookmark")) or finished.exists()) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (
        {name: digest for name, digest in artifacts(tmp_path / out).items() if ".curve." not in name} for out in ("a.work", "b.work")
    )
    assert ours == theirs
    assert artifacts(tmp_path / "a")["model.safetensors"] == artifacts(tmp_path / "b")["model.safetensors"]


def test_two_processes_share_the_work(built: Path, corpus: Path, toys: Path, tmp_path: Path) -> None:
    """Under torchrun: the same tokens, keys and targets as one process, and weights that differ by roundings alone."""
    work = tmp_path / "out.work"
    shutil.copytree(built.with_name("tiny.work") / "teacher", work / "teacher")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launcher, *command(corpus, toys / "base", tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = artifacts(work), artifacts(built.with_name("tiny.work"))
    assert ours.keys() == theirs.keys()
    for name in ("tokens/train.npy", "datastore/values.npy", "knn_targets/tuned.json"):
        assert ours[name] == theirs[name]
    keys = [np.load(folder / "datastore" / "keys.npy").astype(np.float32) for folder in (work, built.with_name("tiny.work"))]
    np.testing.assert_allclose(keys[0], keys[1], atol=0.05)
    one, two = Package.open(built, toys / "base"), Package.open(tmp_path / "out", toys / "base")
    assert two.perplexity["memory"] == pytest.approx(one.perplexity["memory"], rel=0.05)


def test_stages_by_themselves(built: Path, corpus: Path, toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each sub-command stops at its stage; here all are fresh."""
    arguments = ["tiny", "--corpus", str(corpus), "--base", str(toys / "base"), "--out", str(built), *TINY]
    assert main(["datastore", *arguments]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[-1] == str(built.with_name("tiny.work") / "datastore")
    assert "knn_targets" not in told


def test_lambda_is_tuned_beside_every_base(built: Path, corpus: Path, toys: Path, tmp_path: Path) -> None:
    """One package for two bases; everything but the package is fresh."""
    larger = tmp_path / "larger"
    save_model(doubled(load_model(toys / "base")), larger, load_tokenizer(toys / "base"), torch.float32)
    arguments = [
        "--corpus",
        str(corpus),
        "--base",
        str(toys / "base"),
        "--beside",
        str(larger),
        "--work",
        str(built.with_name("tiny.work")),
    ]
    assert main(["package", "tiny", *arguments, "--out", str(tmp_path / "out"), *TINY]) == 0
    for base in (toys / "base", larger):
        assert Package.open(tmp_path / "out", base).tuned
    assert not Package.open(tmp_path / "out", toys / "qwen_a").tuned
    assert (tmp_path / "out" / "README.md").read_text().count("| larger |") == 1


def test_a_stage_that_another_process_makes_is_refused(corpus: Path, toys: Path, tmp_path: Path) -> None:
    """One line; nothing of the other's is touched."""
    other = Build("tiny", Corpus.open(str(corpus)), toys / "base", tmp_path / "out", tmp_path / "out.work")
    with stage(tmp_path / "out.work" / "near_duplicates", {"x": 1}), pytest.raises(ManifestError, match="another process is making it"):
        other.run("near-duplicates")


def test_two_builds_in_one_work_folder_are_refused(corpus: Path, toys: Path, tmp_path: Path) -> None:
    """Whatever their stages: their artifacts would mix."""
    other = Build("tiny", Corpus.open(str(corpus)), toys / "base", tmp_path / "out", tmp_path / "out.work")
    with alone(tmp_path / "out.work"), pytest.raises(ManifestError, match="another build is at work in it"):
        other.run("near-duplicates")
    assert not any((tmp_path / "out.work").iterdir())


def test_verify_tells_what_can_be_served(built: Path, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packages and plain checkpoints; each fault by name."""
    assert main(["verify", str(built), "--base", str(toys / "base")]) == 0
    told = capsys.readouterr().out
    assert "memdec package" in told and "tuned beside this base" in told and told.endswith("can be served\n")
    assert main(["verify", str(toys / "gpt_a"), "--base", str(toys / "base")]) == 0
    assert "plain checkpoint" in capsys.readouterr().out

    broken = Path(shutil.copytree(built, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    first = sorted(weights)[0]
    weights[first][0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    assert main(["verify", str(broken)]) == 1
    assert f"weight {first} holds NaN or infinity" in capsys.readouterr().err
    save_file({name: w for name, w in weights.items() if name != first}, broken / "model.safetensors")
    assert main(["verify", str(broken)]) == 1
    assert "is not in its weights" in capsys.readouterr().err
    (broken / "model.safetensors").write_bytes((built / "model.safetensors").read_bytes()[:-100])
    assert main(["verify", str(broken)]) == 1
    assert "truncated" in capsys.readouterr().err

    foreign = Path(shutil.copytree(built, tmp_path / "foreign"))
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.__getitem__)[50:52]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["verify", str(foreign)]) == 1
    assert "token map" in capsys.readouterr().err
    (foreign / "tokenizer.json").unlink()
    assert main(["verify", str(foreign)]) == 1
    assert "no tokenizer in it" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_too_little_text_is_refused_by_name(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, and no package."""
    folder = tmp_path / "small"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("too short\n")
    code = main(["build", "x", "--corpus", str(folder), "--base", str(toys / "base"), "--out", str(tmp_path / "out")])
    assert code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("memdec: error: corpus small: split test has 6 tokens, wanted at least 5,000")
    assert not (tmp_path / "out").exists()


def test_options_and_bases_that_cannot_work(toys: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each names the key, the value and what is wanted."""
    arguments = ["build", "x", "--corpus", str(corpus), "--out", str(tmp_path / "out"), "--base"]
    assert main(["build", "a b/c", *arguments[2:], str(toys / "base")]) == 1
    assert "NAME 'a b/c': wanted" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--no-ngram", "--with-sources"]) == 1
    assert "--with-sources: would have no effect" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--no-ngram", "--ngram-targets", "0.3"]) == 1
    assert "--ngram-targets 0.3: would have no effect; --no-ngram" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--ngram-targets", "nan"]) == 1
    assert "--ngram-targets nan: wanted" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--beta", "1.5"]) == 1
    assert "--beta 1.5: wanted" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--targets", "bm25"]) == 1
    assert "--targets bm25: wanted knn or knn-lm" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--teacher", str(tmp_path / "none")]) == 1
    assert "--teacher" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--entries", "0"]) == 1
    assert "--entries 0: wanted" in capsys.readouterr().err
    for flag in ("--base", "--corpus", "--work"):
        mine = tmp_path / "mine" / flag[2:]
        shutil.copytree(corpus if flag == "--corpus" else toys / "base", mine)
        values = {"--corpus": str(corpus), "--base": str(toys / "base"), "--out": str(tmp_path / "mine"), flag: str(mine)}
        (tmp_path / "mine" / "manifest.json").write_text("{}")
        assert main(["build", "x", *(word for pair in values.items() for word in pair)]) == 1
        assert f"{flag} is in it and would be replaced" in capsys.readouterr().err
        assert any(mine.iterdir())
    assert main([*arguments, str(toys / "base"), "--seed", "-1"]) == 1
    assert "--seed -1: wanted" in capsys.readouterr().err
    assert main([*arguments, str(toys / "base"), "--checkpoint-every", "nan"]) == 1
    assert "--checkpoint-every nan: wanted" in capsys.readouterr().err
    assert main(["build", "x", "--corpus", str(corpus), "--base", str(toys / "base"), "--out", "/"]) == 1
    assert "--out /: wanted a new folder" in capsys.readouterr().err
    broken = Path(shutil.copytree(toys / "base", tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"nonsense")
    assert main([*arguments, str(broken)]) == 1
    assert "safetensors" in capsys.readouterr().err
