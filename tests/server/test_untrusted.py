"""Models are data: code that comes with them isn't run, and weights that could hold code aren't read."""

import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from memdec.decoders.models import load_model
from memdec.decoders.reading.errors import DecoderError
from memdec.decoders.reading.tokenizer import TRUST, load_tokenizer
from memdec.server.checked_models import check_models
from memdec.server.errors import StartupError
from memdec.server.launch.vllm_arguments import require_safe_loading


class Bomb:
    """Whoever unpickles it leaves a trace."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def evil(toys: Path, tmp_path: Path) -> Path:
    """A model folder whose config, model and tokenizer are classes of its own, which leave a trace when they are imported."""
    folder = Path(shutil.copytree(toys / "qwen_a", tmp_path / "evil"))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}
    for name, kind in (("config.json", {"model_type": "evil"}), ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"})):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | kind | {"auto_map": own}))
    return folder


def test_code_of_a_model_is_not_run(evil: Path, toys: Path) -> None:
    """As decoder, as base, as tokenizer, in training: refused in one line, without asking at the terminal."""
    for base, decoders in ((toys / "base", [f"a={evil}"]), (evil, [])):
        with pytest.raises(StartupError) as caught:
            check_models(str(base), decoders)
        assert "\n" not in str(caught.value)
    for load in (load_tokenizer, load_model):
        with pytest.raises(DecoderError):
            load(evil)
    assert not (evil / "ran").exists()


def test_pickled_weights_are_not_read(toys: Path, tmp_path: Path) -> None:
    """A folder that has them alone is refused by name; one that has both is read without them."""
    folder = Path(shutil.copytree(toys / "qwen_a", tmp_path / "pickled"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(folder / "ran")}))
    check_models(str(toys / "base"), [f"a={folder}"])
    (folder / "model.safetensors").unlink()
    for base, decoders in ((toys / "base", [f"a={folder}"]), (folder, [])):
        with pytest.raises(StartupError, match="only safetensors are loaded"):
            check_models(str(base), decoders)
    with pytest.raises(DecoderError):
        load_model(folder)
    assert not (folder / "ran").exists()


def test_formats_and_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats of pickles are refused; what vLLM would choose itself is pinned; trust is what the user says."""
    monkeypatch.setenv(TRUST, "")
    for name in ("pt", "npcache", "tensorizer", "sharded_state", "bitsandbytes"):
        with pytest.raises(StartupError, match=f"--load-format {name}"):
            require_safe_loading(Namespace(load_format=name, trust_remote_code=False))
    args = Namespace(load_format="auto", trust_remote_code=False)
    require_safe_loading(args)
    assert args.load_format == "safetensors"
