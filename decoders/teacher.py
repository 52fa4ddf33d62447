"""Stages 3 and 6: models tuned on the domain's text alone: the teacher that embeds the datastore, and the student that the decoder starts from.

The paper says little of either, but without them the kNN targets hurt: a teacher worse than its student teaches nothing.
A tuned base is also what "DAPT" means, domain-adaptive pre-training, and serves as that baseline.
"""

from pathlib import Path

import torch

from memdec.decoders import parallel
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.models import load_model, save_model
from memdec.decoders.pretrain import Shape, new_model
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import Schedule, train


def write_tuned(out: Path, tokens: Path, base: Path, schedule: Schedule, manifest: Manifest) -> Path:
    """Tune a copy of the base on the domain, all weights; a Hugging Face folder in float32."""
    with stage(out, manifest) as folder:
        if folder is not None:
            model = load_model(base)
            train(model, load_tokens(tokens, "train"), schedule, out.name, folder=folder)
            if parallel.rank() == 0:
                save_model(model, folder, load_tokenizer(base), torch.float32)
    return out


def write_student(out: Path, tokens: Path, tokenizer: Path, shape: Shape, schedule: Schedule, manifest: Manifest) -> Path:
    """Train a model of the decoder's shape on the domain from random weights; a Hugging Face folder in float32."""
    with stage(out, manifest) as folder:
        if folder is not None:
            vocabulary = load_tokenizer(tokenizer)
            model = new_model(shape, vocabulary, schedule.seed)
            train(model, load_tokens(tokens, "train"), schedule, out.name, folder=folder)
            if parallel.rank() == 0:
                save_model(model, folder, vocabulary, torch.float32)
    return out
