"""A decoder's model with a bias on its logits, which rules out tokens that its domain's vocabulary lacks: vLLM's models have no such bias.

A package holds the bias under the name that Hugging Face would give to a bias of the output head, beside the other weights.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from vllm.model_executor.models.interfaces_base import VllmModelForTextGeneration

from memdec.decoders.reading.names import HEAD_BIAS


class LogitBias(nn.Module):
    """Adds its weight [V] to logits [n, V]; zeros until one is loaded."""

    def __init__(self, ids: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ids), requires_grad=False)

    def forward(self, logits: Tensor) -> Tensor:
        """The sum, in the dtype of the logits."""
        return logits + self.weight


class Tower(nn.Module):
    """One of vLLM's models with a bias on its logits, which behaves as the model otherwise."""

    def __init__(self, model: VllmModelForTextGeneration, ids: int) -> None:
        super().__init__()
        self.model = model
        self.logit_bias = LogitBias(ids)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states, [tokens, H]."""
        hidden: Tensor = self.model(input_ids, positions)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H]."""
        biased: Tensor = self.logit_bias(self.model.compute_logits(hidden))
        return biased

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Load weights by their names in the folder; returns the names of the loaded parameters, None if the model returns none."""
        names = self.model.load_weights(self._others(weights))
        return None if names is None else {"logit_bias.weight", *(f"model.{name}" for name in names)}

    def process_weights_after_loading(self, *args: object) -> None:
        """Process the model's weights as it does itself after loading, if it does."""
        if hasattr(self.model, "process_weights_after_loading"):
            self.model.process_weights_after_loading(*args)

    def _others(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass on all weights but the bias, unless the model has one itself."""
        own = any(name.endswith(HEAD_BIAS) for name, _ in self.model.named_parameters())
        for name, weight in weights:
            if name == HEAD_BIAS and not own:
                self.logit_bias.weight.data.copy_(weight)
            else:
                yield name, weight
