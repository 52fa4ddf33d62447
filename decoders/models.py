"""Loading and saving Hugging Face causal language models, with one-line errors."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.names import HEAD_BIAS
from memdec.decoders.reading.tokenizer import first_line, trusted
from memdec.decoders.reading.weights import PATTERN

OUTSIDE = -1e4  # bias, in the output head, of a token that is never predicted: its probability underflows to 0


def load_model(folder: Path | str) -> PreTrainedModel:
    """Load a causal LM in float32, on the GPU if there is one. Raises PackageError."""
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise PackageError(f"{folder}: no config.json in it; wanted a Hugging Face model folder")
    model: PreTrainedModel
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True, use_safetensors=True, trust_remote_code=trusted()
        )
    except Exception as error:  # transformers raises many kinds here
        raise PackageError(f"{folder}: can't be loaded as a causal language model ({first_line(error)})") from None
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would initialise them at random
        raise PackageError(f"{folder}: {missing[0]} is not in its weights, nor are {len(missing) - 1} others; copy the model again")
    attach_bias(model, Path(folder))
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def attach_bias(model: PreTrainedModel, folder: Path) -> None:
    """Give the output head the bias that the folder's weights have for it, where the architecture knows none (see OUTSIDE)."""
    head = getattr(model, HEAD_BIAS.partition(".")[0], None)
    if head is None or getattr(head, "bias", None) is not None:
        return
    for file in sorted(folder.glob(PATTERN)):
        with safe_open(file, framework="pt") as tensors:
            if HEAD_BIAS in tensors.keys():  # noqa: SIM118
                head.bias = nn.Parameter(tensors.get_tensor(HEAD_BIAS).to(head.weight.dtype), requires_grad=False)


def save_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer as a Hugging Face folder that everybody may read."""
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors creates its files for the owner alone
        file.chmod(0o644)
