"""LoRA: low-rank adapters on every matrix of a base's blocks, their rank matched to the decoder's parameters; with peft."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from memdec.decoders import parallel
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.models import load_model, save_model
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import Schedule, train

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALE = 2  # alpha / rank


def matched_rank(base: PreTrainedModel, parameters: int) -> int:
    """The rank whose adapters have closest to `parameters` weights."""
    linears = [m for n, m in base.named_modules() if n.endswith(TARGETS) and isinstance(m, torch.nn.Linear)]
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in linears)))


def write_lora(out: Path, tokens: Path, base: Path, parameters: int, schedule: Schedule, manifest: Manifest) -> Path:
    """Tune adapters of about `parameters` weights on the domain; write a Hugging Face folder with them merged into the base."""
    from peft import LoraConfig, get_peft_model

    with stage(out, manifest) as folder:
        if folder is not None:
            model = load_model(base)
            torch.manual_seed(schedule.seed)
            rank = matched_rank(model, parameters)
            config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=list(TARGETS), lora_dropout=0.0)
            adapted = get_peft_model(model, config)  # puts its layers into `model` itself
            train(model, load_tokens(tokens, "train"), schedule, out.name, folder=folder)
            if parallel.rank() == 0:
                save_model(adapted.merge_and_unload(), folder, load_tokenizer(base), torch.float32)
    return out
