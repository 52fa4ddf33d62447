"""Random toy models that share one tokenizer: made in seconds, wrong in no layer (norms and biases are random too)."""

import shutil
import sysconfig
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from memdec.decoders.models import OUTSIDE
from memdec.decoders.new_tokenizer import train_tokenizer

VOCABULARY = 1000
BASE_ROWS, QWEN_ROWS, GPT_ROWS = 1024, 1008, 1088  # models pad their vocabularies, each in its own way


def make_toys(root: Path) -> Path:
    """Write `base`, `qwen_a`, `qwen_b`, `gpt_a` and `gpt_b` under `root`."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    tokenizer = train_tokenizer((f.read_text(errors="ignore") for f in files), VOCABULARY)
    models: dict[str, PreTrainedModel] = {
        "base": qwen(1, BASE_ROWS, hidden=128, layers=3, heads=2, spread=0.1),
        "qwen_a": qwen(11, QWEN_ROWS, hidden=64, layers=2, heads=2, spread=0.2),
        "qwen_b": qwen(12, QWEN_ROWS, hidden=64, layers=2, heads=2, spread=0.2),
        "gpt_a": gpt(21),
        "gpt_b": gpt(22),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def with_vocabulary(model: Path, out: Path, share: float) -> Path:
    """A copy of a toy that rules out all tokens but this share, by a bias of its output head."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    ids = len(weights["model.embed_tokens.weight"])
    weights["lm_head.bias"] = torch.where(torch.rand(ids, generator=torch.Generator().manual_seed(ids)) < share, 0.0, OUTSIDE)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def qwen(seed: int, rows: int, hidden: int, layers: int, heads: int, spread: float) -> PreTrainedModel:
    """A Qwen2 with random everything."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=rows, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1,
        intermediate_size=3 * hidden, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        initializer_range=spread,
    )  # fmt: skip
    return roughen(Qwen2ForCausalLM(config))


def gpt(seed: int) -> PreTrainedModel:
    """A GPT-2 with random everything."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=GPT_ROWS, n_embd=64, n_layer=2, n_head=2, n_positions=1024, bos_token_id=0, eos_token_id=0, initializer_range=0.2
    )
    return roughen(GPT2LMHeadModel(config))


def roughen(model: PreTrainedModel) -> PreTrainedModel:
    """Give norms and biases, which start as ones and zeros, values that tell layers apart."""
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY:] = 0  # padding is hardly ever sampled
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
