"""What must not start: one clear line, exit code 1, nothing left running."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import given
from safetensors.torch import load_file, save_file

from memdec.server.checked_models import check_models
from memdec.server.errors import StartupError
from memdec.server.naming import parse_named

pytestmark = pytest.mark.engine


@pytest.fixture
def decoder(toys: Path, tmp_path: Path) -> Path:
    """A copy of a good decoder, to be broken."""
    return Path(shutil.copytree(toys / "qwen_a", tmp_path / "decoder"))


def refusal(toys: Path, *decoders: str) -> str:
    """The message with which these decoders are refused."""
    with pytest.raises(StartupError) as caught:
        check_models(str(toys / "base"), list(decoders))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_good_models_pass(toys: Path) -> None:
    """The toys themselves, with the default lambda of a plain checkpoint."""
    models = check_models(str(toys / "base"), [f"a={toys / 'qwen_a'}", f"b={toys / 'qwen_b'}"])
    assert [d.name for d in models.domains] == ["a", "b"]
    assert models.domains.base == "base"
    assert models.domains.all[0].lam == 0.6
    assert not models.domains.all[0].tuned
    assert models.positions == 1024


def test_truncated_weights(toys: Path, decoder: Path) -> None:
    """A download that broke off."""
    file = decoder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "truncated" in refusal(toys, f"a={decoder}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(bad: float, dtype: torch.dtype, toys: Path, decoder: Path) -> None:
    """One bad number among thousands, in each dtype."""
    weights = {name: w.to(dtype) for name, w in load_file(decoder / "model.safetensors").items()}
    name = sorted(weights)[3]
    weights[name].view(-1)[1] = bad
    save_file(weights, decoder / "model.safetensors")
    message = refusal(toys, f"a={decoder}")
    assert "NaN or infinity" in message
    assert name in message


def test_integer_weights(toys: Path, decoder: Path) -> None:
    """A dtype that is no weight's."""
    weights = load_file(decoder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name].to(torch.int32)
    save_file(weights, decoder / "model.safetensors")
    assert "I32" in refusal(toys, f"a={decoder}")


def test_another_token_map_of_equal_size(toys: Path, decoder: Path) -> None:
    """Two tokens swapped: the message names the first that differs."""
    path = decoder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, i in vocabulary.items() if i in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer))
    message = refusal(toys, f"a={decoder}")
    assert "2 of" in message
    assert "300" in message


def test_decoders_of_two_shapes(toys: Path) -> None:
    """Both names and what differs."""
    message = refusal(toys, f"first={toys / 'qwen_a'}", f"second={toys / 'gpt_a'}")
    assert "first" in message
    assert "second" in message


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_files(missing: str, toys: Path, decoder: Path) -> None:
    """A folder without its model."""
    (decoder / missing).unlink()
    assert str(decoder) in refusal(toys, f"a={decoder}")


def test_missing_tokenizer(toys: Path, decoder: Path) -> None:
    """Weights alone can't be checked against the base."""
    for file in decoder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refusal(toys, f"a={decoder}")


def test_broken_package_files(toys: Path, decoder: Path) -> None:
    """Not JSON, another format, a lambda that is none."""
    record = decoder / "memory_decoder.json"
    record.write_text("{")
    assert "not valid JSON" in refusal(toys, f"a={decoder}")
    record.write_text(json.dumps({"format": 99}))
    assert "99" in refusal(toys, f"a={decoder}")
    record.write_text(json.dumps({"format": 1, "lambda": 1.5}))
    assert "1.5" in refusal(toys, f"a={decoder}")


def test_names_and_paths(toys: Path) -> None:
    """What can't be a header, alias and label; twice the same; nowhere."""
    for text in ("a", "=x", "a=", "a b=x", "-a=x", "é=x"):
        with pytest.raises(StartupError, match="--decoder"):
            parse_named("--decoder", text)
    assert "twice" in refusal(toys, f"a={toys / 'qwen_a'}", f"a={toys / 'qwen_b'}")
    assert "no such folder" in refusal(toys, "a=/nowhere/at/all")
    with pytest.raises(StartupError, match="no such folder"):
        check_models("/nowhere", [])


def test_unknown_architectures(toys: Path, decoder: Path) -> None:
    """More than one name, none."""
    edit_json(decoder / "config.json", architectures=[])
    assert "architectures" in refusal(toys, f"a={decoder}")


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`memdec serve` that is expected to end by itself."""
    return subprocess.run([sys.executable, "-m", "memdec", "serve", *arguments], capture_output=True, text=True, timeout=300)


def test_the_command_line_says_one_line_and_exits_with_one(toys: Path, decoder: Path) -> None:
    """No traceback at the user."""
    (decoder / "model.safetensors").unlink()
    done = serve(str(toys / "base"), "--decoder", f"a={decoder}", "--enforce-eager")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("memdec: error: ")
    assert "Traceback" not in done.stderr


def test_a_context_longer_than_the_decoders_is_refused(toys: Path) -> None:
    """A decoder must never run past its positions."""
    done = serve(str(toys / "base"), "--decoder", f"a={toys / 'gpt_a'}", "--max-model-len", "4096")
    assert done.returncode == 1
    assert "1024" in done.stderr.strip().splitlines()[-1]


def test_no_compiler(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's own complaint is pages long."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    with pytest.raises(StartupError, match=r"^no-such-compiler: [^\n]*$"):
        given(toys)


def test_an_architecture_vllm_does_not_have(toys: Path, decoder: Path) -> None:
    """Named, with its owner."""
    edit_json(decoder / "config.json", architectures=["NobodysForCausalLM"])
    with pytest.raises(StartupError, match=r"NobodysForCausalLM[^\n]*$"):
        given(toys, "--decoder", f"b={decoder}")


def test_fewer_embeddings_than_tokens(toys: Path, decoder: Path) -> None:
    """An id without an embedding would end the engine in mid-request."""
    edit_json(decoder / "config.json", vocab_size=900)
    assert "900" in refusal(toys, f"a={decoder}")


def test_a_broken_base(toys: Path, tmp_path: Path) -> None:
    """The base is checked like the decoders."""
    base = Path(shutil.copytree(toys / "base", tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, base / "model.safetensors")
    with pytest.raises(StartupError, match=name):
        check_models(str(base), [])


@pytest.mark.parametrize("option", [["--enable-lora"], ["--api-server-count", "2"], ["--pipeline-parallel-size", "2"]])
def test_options_that_memories_cannot_have(option: list[str], toys: Path) -> None:
    """Refused by name, not ignored."""
    with pytest.raises(StartupError, match=f"{option[0]}[^\n]*$"):
        given(toys, "--enforce-eager", *option)
