"""Loading Hugging Face causal language models for training and evaluation, with one-line errors."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from decoders.errors import PackageError
from decoders.tokenizer import first_line


def load_model(folder: Path | str) -> PreTrainedModel:
    """Load a causal LM in float32, on the GPU if there is one. Raises PackageError."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds here
        raise PackageError(f"{folder}: can't be loaded as a causal language model ({first_line(error)})") from None
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
