"""Sampled continuations of the same prompts under every method, side by side, for people to read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoders.datastore import Datastore
from decoders.models import load_model
from decoders.study.latency import Stepper
from decoders.study.scores import Models

TOKENS, TEMPERATURE, SEED = 40, 0.8, 0
Next = Callable[[torch.Tensor], torch.Tensor]  # tokens to append [1, n] -> probabilities of the next one [V]


def continuations(
    models: Models, tuned: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...]
) -> list[dict[str, str]]:
    """A dict a prompt: the prompt and each method's continuation, all sampled with the same seed."""
    found = []
    for prompt in prompts:
        row = {"prompt": prompt}
        for method, following in _methods(models, tuned).items():
            row[method] = sample(following, tokenizer, prompt)
        found.append(row)
    return found


@torch.inference_mode()
def sample(following: Next, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """TOKENS tokens at TEMPERATURE; stops at the end of text."""
    generator = torch.Generator().manual_seed(SEED)
    fed = torch.tensor([tokenizer(prompt)["input_ids"]])
    ids: list[int] = []
    while len(ids) < TOKENS:
        sharpened = following(fed).double() ** (1 / TEMPERATURE)
        ids.append(int(torch.multinomial(sharpened, 1, generator=generator)))
        if ids[-1] == tokenizer.eos_token_id:
            break
        fed = torch.tensor([ids[-1:]])
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _methods(models: Models, tuned: dict[str, Any]) -> dict[str, Next]:
    """Fresh caches for every method."""
    base = load_model(models.base)
    found = {"base": _plain(base)}
    best = tuned["knn_teacher"]
    found["knn_teacher"] = _retrieved(base, load_model(models.teacher), Datastore.open(models.store), best)
    for method, folder in (("dapt", models.dapt), ("lora", models.lora)):
        if folder is not None:
            found[method] = _plain(load_model(folder))
    for method, folder in (("control", models.control), ("decoder", models.decoder)):
        found[method] = _mixed(_plain(base), _plain(load_model(folder)), tuned[method]["lambda"])
    return found


def _plain(model: PreTrainedModel) -> Next:
    stepper = Stepper(model)
    return lambda fed: stepper.feed(fed)[0].exp()


def _mixed(base: Next, memory: Next, lam: float) -> Next:
    def following(fed: torch.Tensor) -> torch.Tensor:
        p, q = base(fed), memory(fed)
        shared = min(len(p), len(q))  # vocabularies may differ by padding
        return (1 - lam) * p[:shared] + lam * q[:shared]

    return following


def _retrieved(base: PreTrainedModel, teacher: PreTrainedModel, store: Datastore, best: dict[str, Any]) -> Next:
    ours, theirs = Stepper(base), Stepper(teacher, keys=True)

    def following(fed: torch.Tensor) -> torch.Tensor:
        p = (1 - best["lam"]) * ours.feed(fed)[0].exp()
        distances, numbers = store.search(theirs.feed(fed)[1].numpy(), best["neighbours"])
        weights = torch.softmax(torch.from_numpy(-distances[0] / best["tau"]), 0)
        values = torch.from_numpy(np.asarray(store.values[numbers[0]]).astype(np.int64))
        mixed: torch.Tensor = p.scatter_add(0, values, best["lam"] * weights)
        return mixed

    return following
