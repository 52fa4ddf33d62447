"""Milliseconds per token of every method, in one run, one request at a time, interleaved; Hugging Face models with a KV cache.

Not the server's speed (that is vLLM's), but all methods by the same means: what each adds to the base is what matters.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from decoders.datastore import Datastore
from decoders.passages import Passages, RagOptions
from decoders.tokens import Ids

ROUNDS = 5
PROMPT = 256


class Stepper:
    """One model with its KV cache: gives the logits and the final hidden state of the last position."""

    def __init__(self, model: PreTrainedModel, keys: bool = False) -> None:
        self.model, self.keys = model, keys
        self.cache = None

    def feed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens [1, n]; returns log-probabilities [V] and the hidden state [1, width], [1, 0] unless keys are wanted."""
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, output_hidden_states=self.keys)
        self.cache = out.past_key_values
        return out.logits[0, -1].log_softmax(-1), out.hidden_states[-1][:, -1] if self.keys else out.logits[0, :, :0]


@torch.inference_mode()
def milliseconds(methods: dict[str, Callable[[torch.Tensor, int], None]], prompt: Ids, tokens: int) -> dict[str, float]:
    """Median over ROUNDS of milliseconds per token for each method, every round in turn through all of them."""
    start = torch.from_numpy(np.asarray(prompt[:PROMPT]).astype(np.int64))[None]
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, decode in methods.items():
            begun = time.perf_counter()
            decode(start, tokens)
            taken[name].append(1e3 * (time.perf_counter() - begun) / tokens)
    return {name: round(float(np.median(values)), 3) for name, values in taken.items()}


def plain(model: PreTrainedModel) -> Callable[[torch.Tensor, int], None]:
    """Greedy decoding with one model; the prompt's own pass counts, as it does for all."""

    def decode(prompt: torch.Tensor, tokens: int) -> None:
        stepper, fed = Stepper(model), prompt
        for _ in range(tokens):
            fed = stepper.feed(fed)[0].argmax().reshape(1, 1)

    return decode


def mixture(base: PreTrainedModel, memory: PreTrainedModel, lam: float) -> Callable[[torch.Tensor, int], None]:
    """Base and memory decoder, one after the other."""

    def decode(prompt: torch.Tensor, tokens: int) -> None:
        ours, theirs, fed = Stepper(base), Stepper(memory), prompt
        for _ in range(tokens):
            p, q = ours.feed(fed)[0].exp(), theirs.feed(fed)[0].exp()
            shared = min(len(p), len(q))  # vocabularies may differ by padding
            mixed = (1 - lam) * p[:shared] + lam * q[:shared]
            fed = mixed.argmax().reshape(1, 1)

    return decode


def knn(
    base: PreTrainedModel, store: Datastore, neighbours: int, tau: float, lam: float, encoder: PreTrainedModel | None = None
) -> Callable[[torch.Tensor, int], None]:
    """kNN-LM: one search a token, with the base's own key or another model's."""

    def decode(prompt: torch.Tensor, tokens: int) -> None:
        ours, fed = Stepper(base, keys=encoder is None), prompt
        theirs = Stepper(encoder, keys=True) if encoder is not None else None
        for _ in range(tokens):
            logprobs, key = ours.feed(fed)
            if theirs is not None:
                key = theirs.feed(fed)[1]
            distances, numbers = store.search(key.numpy(), neighbours)
            weights = torch.softmax(torch.from_numpy(-distances[0] / tau), 0)
            p = (1 - lam) * logprobs.exp()
            p.scatter_add_(0, torch.from_numpy(store.values[numbers[0]].astype(np.int64)), lam * weights)
            fed = p.argmax().reshape(1, 1)

    return decode


def rag(base: PreTrainedModel, passages: Passages, how: RagOptions) -> Callable[[torch.Tensor, int], None]:
    """A new passage, and so a new pass over passage and context, every `stride` tokens."""

    def decode(prompt: torch.Tensor, tokens: int) -> None:
        text = prompt
        for done in range(tokens):
            if done % how.stride == 0:
                found = passages.best([text[0, -how.query :].numpy().astype(np.uint16)])
                stepper, fed = Stepper(base), torch.cat([torch.from_numpy(found.astype(np.int64)), text], 1)
            fed = stepper.feed(fed)[0].argmax().reshape(1, 1)
            text = torch.cat([text, fed], 1)

    return decode
