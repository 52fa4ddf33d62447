"""What a training step minimises, from final hidden states: cross-entropy against targets, or the loss of the mixture with the base."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdec.decoders.head import Head
from memdec.decoders.loss import mixture_loss, sparse_cross_entropy

# windows' start positions [B], their labels [B, T] -> sparse targets: ids and probs, each [B * T, K]
Targets = Callable[[NDArray[np.int64], Tensor], tuple[Tensor, Tensor]]


class Objective(Protocol):
    """A loss of a batch."""

    def __call__(self, head: Head, hidden: Tensor, starts: NDArray[np.int64], labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Mean loss, a scalar, of windows at `starts` [B] with labels [B, T], from hidden [B * T, H]; products are computed in `dtype`."""


def plain_targets(_starts: NDArray[np.int64], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Targets of ordinary language modelling: all mass on the next token."""
    ids = labels.reshape(-1, 1)
    return ids, torch.ones(ids.shape)


@dataclass(frozen=True)
class Imitation:
    """Cross-entropy against sparse targets. What they give to tokens outside the head's vocabulary is left out."""

    targets: Targets = plain_targets

    def __call__(self, head: Head, hidden: Tensor, starts: NDArray[np.int64], labels: Tensor, dtype: torch.dtype) -> Tensor:
        """See Objective."""
        ids, probs = (x.to(hidden.device) for x in self.targets(starts, labels))
        if head.places is not None:
            ids = head.places[ids]
            outside = torch.where(ids < 0, probs, 0).sum(1)
            kept = outside < 0.999
            probs = (torch.where(ids < 0, 0, probs) / (1 - outside)[:, None])[kept]
            ids, hidden = ids[kept].clamp(min=0), hidden[kept]
        return sparse_cross_entropy(*head.operands(hidden, dtype), ids, probs)


LABELS = Imitation()


@dataclass(frozen=True)
class Mixture:
    """-log(lam * p_mem + (1 - lam) * p_base) of the labels: the memory spends itself where the base is unsure."""

    logprobs: NDArray[np.float32]
    """log p_base of the label at each position of the text, [tokens]."""
    lam: float

    def __call__(self, head: Head, hidden: Tensor, starts: NDArray[np.int64], labels: Tensor, dtype: torch.dtype) -> Tensor:
        """See Objective. Labels outside the head's vocabulary are left out: the memory can't change their loss."""
        base = torch.from_numpy(np.concatenate([self.logprobs[s : s + labels.shape[1]] for s in starts])).to(hidden.device)
        ids = labels.reshape(-1)
        if head.places is not None:
            ids = head.places[ids]
            kept = ids >= 0
            ids, base, hidden = ids[kept], base[kept], hidden[kept]
        return mixture_loss(*head.operands(hidden, dtype), ids, base, self.lam)
