"""Every method as a step function, from tokens to append [1, n] to next-token probabilities [V]; Hugging Face models with a KV cache."""

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from memdec.decoders.reading.datastore import Datastore
from memdec.decoders.reading.neighbours import weights
from memdec.decoders.reading.passages import Passages, RagOptions

Step = Callable[[torch.Tensor], torch.Tensor]


class Stepper:
    """One model with its KV cache; returns probabilities and the final hidden state of the last position."""

    def __init__(self, model: PreTrainedModel, keys: bool = False) -> None:
        self.model, self.keys = model, keys
        self.cache = None

    def feed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens [1, n]; returns probabilities [V] and the hidden state [1, width], [1, 0] unless keys are wanted."""
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, output_hidden_states=self.keys)
        self.cache = out.past_key_values
        return out.logits[0, -1].softmax(-1), out.hidden_states[-1][:, -1] if self.keys else out.logits[0, :, :0]


def plain(model: PreTrainedModel) -> Step:
    """One model alone."""
    stepper = Stepper(model)
    return lambda fed: stepper.feed(fed)[0]


def mixed(base: PreTrainedModel, memory: PreTrainedModel, lam: float) -> Step:
    """Base and memory decoder, one after the other."""
    ours, theirs = plain(base), plain(memory)

    def step(fed: torch.Tensor) -> torch.Tensor:
        p, q = ours(fed), theirs(fed)
        shared = min(len(p), len(q))  # vocabularies may differ by padding
        return (1 - lam) * p[:shared] + lam * q[:shared]

    return step


def retrieved(
    base: PreTrainedModel, store: Datastore, neighbours: int, tau: float, lam: float, encoder: PreTrainedModel | None = None
) -> Step:
    """kNN-LM: one search per token, with the base's own hidden state, or that of `encoder`, as query."""
    ours = Stepper(base, keys=encoder is None)
    theirs = Stepper(encoder, keys=True) if encoder is not None else None

    def step(fed: torch.Tensor) -> torch.Tensor:
        p, key = ours.feed(fed)
        if theirs is not None:
            key = theirs.feed(fed)[1]
        distances, numbers = store.search(key.numpy(), neighbours)
        mass = torch.from_numpy(weights(distances, tau)[0])
        values = torch.from_numpy(np.asarray(store.values[numbers[0]]).astype(np.int64))
        return ((1 - lam) * p).scatter_add(0, values, lam * mass)

    return step


def rag(base: PreTrainedModel, passages: Passages, how: RagOptions) -> Step:
    """RAG: fetches a new passage every `stride` tokens, and then prefills passage and context anew."""
    text, done = torch.zeros(1, 0, dtype=torch.int64), 0
    stepper = Stepper(base)

    def step(fed: torch.Tensor) -> torch.Tensor:
        nonlocal text, done, stepper
        text = torch.cat([text, fed], 1)
        if done % how.stride == 0:
            passage = passages.best([text[0, -how.query :].numpy().astype(np.uint16)])
            stepper, fed = Stepper(base), torch.cat([torch.from_numpy(passage.astype(np.int64)), text], 1)
        done += 1
        return stepper.feed(fed)[0]

    return step
