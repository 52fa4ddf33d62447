"""Loading and saving Hugging Face causal language models, with one-line errors."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.tokenizer import first_line, trusted


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
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def save_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer as a Hugging Face folder that everybody may read."""
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # safetensors creates its files for the owner alone
        file.chmod(0o644)
