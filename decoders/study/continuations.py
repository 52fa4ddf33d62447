"""Sampled continuations of the same prompts under every method, side by side, for people to read."""

import itertools
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from memdec.decoders.models import load_model
from memdec.decoders.reading.datastore import Datastore
from memdec.decoders.study.scores import Models
from memdec.decoders.study.steps import Step, mixed, plain, retrieved

TOKENS, TEMPERATURE, SEED = 40, 0.8, 0


def continuations(
    models: Models, tuned: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...]
) -> list[dict[str, str]]:
    """Continue every prompt with every method, all sampled with the same seed; a dict per prompt: the prompt, and a text by method."""
    rows = []
    for prompt in prompts:
        row = {"prompt": prompt}
        for method, step in _methods(models, tuned).items():
            row[method] = sample(step, tokenizer, prompt)
        rows.append(row)
    return rows


@torch.inference_mode()
def sample(step: Step, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """TOKENS tokens at TEMPERATURE; stops at the end of text."""
    generator = torch.Generator().manual_seed(SEED)
    fed = torch.tensor([tokenizer(prompt)["input_ids"]])
    ids: list[int] = []
    while len(ids) < TOKENS:
        sharpened = step(fed).double() ** (1 / TEMPERATURE)
        ids.append(int(torch.multinomial(sharpened, 1, generator=generator)))
        if ids[-1] == tokenizer.eos_token_id:
            break
        fed = torch.tensor([ids[-1:]])
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _methods(models: Models, tuned: dict[str, Any]) -> dict[str, Step]:
    """Every method's step function, with an empty KV cache."""
    base = load_model(models.base)
    steps = {"base": plain(base)}
    for method, store, keyed in itertools.islice(models.retrievers(), 1):  # one is enough to read
        best, encoder = tuned[method], None if keyed == models.base else load_model(keyed)
        steps[method] = retrieved(base, Datastore.open(store), best["neighbours"], best["tau"], best["lam"], encoder)
    for method, folder in (("dapt", models.dapt), ("lora", models.lora)):
        if folder is not None:
            steps[method] = plain(load_model(folder))
    for method, folder in (("control", models.control), ("decoder", models.decoder)):
        if folder is not None:
            steps[method] = mixed(base, load_model(folder), tuned[method]["lambda"])
    return steps
