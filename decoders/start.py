"""A student that starts from a pretrained model: it has some of its layers, freezes embeddings that equal the base's, and may predict fewer tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from memdec.decoders import parallel
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.models import OUTSIDE, load_model, save_model
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.errors import OptionError, PackageError
from memdec.decoders.reading.names import HEAD_BIAS
from memdec.decoders.reading.tokenizer import first_line, load_tokenizer, trusted
from memdec.decoders.reading.weights import weight_files
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import Schedule, Validation, train

LAYER = re.compile(r"(.*\.(?:layers|h|blocks)\.)(\d+)(\..*)")  # a parameter's name: before, number of its layer, after


@dataclass(frozen=True)
class Start:
    """What a student starts from."""

    init: Path
    """A pretrained model with the base's tokenizer."""
    layers: str
    """Which of its layers; see `chosen_layers`."""
    base: Path
    """The base, whose embeddings are not trained where `init` has the same."""
    least: int
    """The student predicts only tokens that occur so often in the training text; 0: all."""

    def write(self, out: Path, tokens: Path, schedule: Schedule, manifest: Manifest, curve: Validation | None = None) -> Path:
        """Train it on the domain's labels; write a Hugging Face folder in float32."""
        with stage(out, manifest) as folder:
            if folder is not None:
                model, ids = with_layers(load_model(self.init), self.layers), load_tokens(tokens, "train")
                if self.least:
                    restrict(model, ids, self.least)
                freeze_embeddings(model, self.base)
                train(model, ids, schedule, out.name, folder=folder, curve=curve)
                if parallel.rank() == 0:
                    save_model(model, folder, load_tokenizer(self.init), torch.float32)
        return out


def chosen_layers(layers: str, total: int) -> list[int]:
    """The numbers of the layers that `--init-layers` names, of a model that has `total`. Raises OptionError."""
    if layers == "all":
        return list(range(total))
    wanted = f"--init-layers {layers}: wanted all, different numbers from 0 to {total - 1} in rising order (0,1,{total - 1}), or how many, up to {total}"
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", layers):
        raise OptionError(wanted)
    numbers = [int(number) for number in layers.split(",")]
    if "," not in layers:
        count = numbers[0]
        numbers = [*range(count - 1), total - 1] if count else []
    if not numbers or numbers != sorted(set(numbers)) or numbers[-1] >= total:
        raise OptionError(wanted)
    return numbers


def layers_of(folder: Path) -> int:
    """How many layers a model folder's config says. Raises PackageError."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted()).get_text_config()
        return int(config.num_hidden_layers)
    except Exception as error:  # transformers raises many kinds here
        raise PackageError(f"--init {folder}: no configuration that transformers can read ({first_line(error)})") from None


def with_layers(model: PreTrainedModel, layers: str) -> PreTrainedModel:
    """A model of the chosen layers of `model`, in float32. Raises OptionError or PackageError."""
    numbers = chosen_layers(layers, model.config.num_hidden_layers)
    config = AutoConfig.for_model(**{k: v for k, v in model.config.to_dict().items() if k not in ("layer_types", "max_window_layers")})
    config.num_hidden_layers = len(numbers)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[number] for number in numbers]
    state = {}
    for name, value in model.state_dict().items():
        layer = LAYER.fullmatch(name)
        if layer is None:
            state[name] = value
        elif int(layer[2]) in numbers:
            state[f"{layer[1]}{numbers.index(int(layer[2]))}{layer[3]}"] = value
    part: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    try:
        part.load_state_dict(state)
    except RuntimeError:
        raise PackageError(f"--init: layers of {model.config.model_type} models can't be taken apart; wanted a Llama or GPT kind") from None
    return part.eval().to(model.device)


def restrict(model: PreTrainedModel, ids: Ids, least: int) -> None:
    """Give the model a bias of its output head that rules out the tokens which occur fewer than `least` times in `ids` [tokens]."""
    head: Any = model.get_output_embeddings()
    known = head is getattr(model, HEAD_BIAS.partition(".")[0], None)
    if head is None or not known or head.bias is not None:
        kind = model.config.model_type
        raise OptionError(f"--min-count {least}: the output head of {kind} models has a bias or a name of its own; wanted 0")
    counts = torch.from_numpy(np.bincount(ids, minlength=len(head.weight)))
    if not bool((counts >= least).any()):
        raise OptionError(f"--min-count {least}: no token of the training text occurs so often")
    head.bias = nn.Parameter(torch.where(counts >= least, 0.0, OUTSIDE).to(head.weight.device), requires_grad=False)


def freeze_embeddings(model: PreTrainedModel, base: Path) -> None:
    """Don't train the embeddings, nor the output head, where they equal the base's: they needn't be stored twice."""
    ours = {name: value for name, value in model.named_parameters() if value.ndim == 2 and not LAYER.fullmatch(name)}
    for name, value in base_tensors(base, list(ours)):
        if value.shape == ours[name].shape and torch.equal(value.float(), ours[name].data.cpu().float()):
            ours[name].requires_grad_(False)


def base_tensors(base: Path, names: Sequence[str]) -> list[tuple[str, torch.Tensor]]:
    """The tensors of these names that a model folder has."""
    present = []
    for file in weight_files(base):
        with safe_open(file, framework="pt") as tensors:
            present += [(name, tensors.get_tensor(name)) for name in names if name in tensors.keys()]  # noqa: SIM118
    return present
