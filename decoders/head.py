"""A model's output head: logits from final hidden states, without running the model.

Training and the kNN targets need logits of chosen rows only, from hidden states that they already have. Most models compute
`hidden @ weight.T`; Granite and Cohere scale that, Phi adds a bias. The form isn't looked up by architecture: it is fitted to
the logits of a short probe, which it must reproduce.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memdec.decoders.models import OUTSIDE
from memdec.decoders.reading.errors import PackageError

PROBED = 32  # tokens of the sequence whose logits are compared
TOLERATED = 1e-3  # of the largest logit
CAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_softcap",
)  # too gentle at a fresh model's small logits to be noticed by the probe


@dataclass(frozen=True)
class Head:
    """logits = scale * (hidden @ weight.T) + bias."""

    weight: Tensor
    """[V, H]; the model's own parameter, so training it trains the model."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    rows: Tensor | None = None
    """Ids of the tokens that can be predicted, [v]; None: all. The fused losses then see these alone."""
    places: Tensor | None = None
    """Each token's place among `rows`, [V]; -1: it has none."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of a model that isn't in training mode. Raises PackageError if its logits are no linear function of its hidden states."""
        layer = model.get_output_embeddings()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        ids = torch.arange(PROBED, device=weight.device)[None] * 7 % min(model.config.get_text_config().vocab_size, len(weight))
        hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        plain = (hidden @ weight.T).float()
        shifted = wanted if bias is None else wanted - bias.float()
        scale = float((plain * shifted).sum() / (plain * plain).sum().clamp_min(torch.finfo(torch.float32).tiny))
        scale = 1.0 if abs(scale - 1) < TOLERATED or not plain.any() else scale
        error = (scale * plain - shifted).abs().max()
        if error > TOLERATED * shifted.abs().max() or any(getattr(model.config, name, None) for name in CAPS):
            kind = type(model).__name__
            raise PackageError(
                f"{kind}: its logits are no linear function of its hidden states (a soft cap, perhaps); it can't be trained here"
            )
        return cls(weight, bias, scale)

    def restricted(self) -> "Head":
        """The same head without the tokens that its bias rules out, which saves their cost."""
        if self.bias is None or not bool((ruled_out := self.bias <= OUTSIDE / 2).any()):
            return self
        rows = (~ruled_out).nonzero()[:, 0]
        places = torch.full((len(self.bias),), -1, device=rows.device)
        places[rows] = torch.arange(len(rows), device=rows.device)
        bias = self.bias if bool(self.bias[rows].any()) else None
        return replace(self, bias=bias, rows=rows, places=places)

    def operands(self, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H'] and weight [V, H'] (or of `rows` alone) in `dtype`, whose product is the logits; for the fused losses."""
        hidden = hidden if self.scale == 1 else hidden * self.scale
        weight, bias = self.weight, self.bias
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        if bias is None:
            return hidden, weight
        return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1), torch.cat([weight, bias.to(dtype)[:, None]], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, H]."""
        inputs, weight = self.operands(hidden, self.weight.dtype)
        return inputs @ weight.T
