"""Stages 3 and 6: models trained on the domain's text alone: the teacher, which embeds the datastore, and the student, which becomes the decoder.

The paper says little of either, but without them the kNN targets hurt: the teacher must be better than the student.
The tuned base is also the baseline DAPT, domain-adaptive pre-training.
"""

from pathlib import Path

import torch

from memdec.decoders import parallel
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.models import load_model, save_model
from memdec.decoders.pretrain import Shape, new_model
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import Schedule, Validation, train


def write_tuned(out: Path, tokens: Path, base: Path, schedule: Schedule, manifest: Manifest) -> Path:
    """Tune all weights of a copy of the base on the domain; write a Hugging Face folder in float32."""
    with stage(out, manifest) as folder:
        if folder is not None:
            model = load_model(base)
            train(model, load_tokens(tokens, "train"), schedule, out.name, folder=folder)
            if parallel.rank() == 0:
                save_model(model, folder, load_tokenizer(base), torch.float32)
    return out


def write_student(
    out: Path, tokens: Path, tokenizer: Path, shape: Shape, schedule: Schedule, manifest: Manifest, curve: Validation | None = None
) -> Path:
    """Train a model of the decoder's shape on the domain from random weights; write a Hugging Face folder in float32."""
    with stage(out, manifest) as folder:
        if folder is not None:
            vocabulary = load_tokenizer(tokenizer)
            model = new_model(shape, vocabulary, schedule.seed)
            train(model, load_tokens(tokens, "train"), schedule, out.name, folder=folder, curve=curve)
            if parallel.rank() == 0:
                save_model(model, folder, vocabulary, torch.float32)
    return out
