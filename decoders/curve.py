"""Learning curves: the memory's perplexity on the validation split, alone and mixed into the base, while it trains."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memdec.decoders import parallel
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.models import load_model
from memdec.decoders.perplexity import best_lambda, figures, label_logprobs, windows
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.tokens import load_tokens

VALIDATED = 32  # validation windows, of 256 scored tokens each


@dataclass(frozen=True)
class Curve:
    """A learning curve: perplexities, measured every `every` training tokens."""

    every: int
    valid: Ids
    """The validation split, [tokens]."""
    base: NDArray[np.float64]
    """The base's log-probabilities of the split's scored tokens, [n]."""

    @classmethod
    def open(cls, folder: Path, tokens: Path, every: int) -> "Curve":
        """Open the artifact that `write_validation` made."""
        return cls(every, load_tokens(tokens, "valid"), np.load(folder / "logprobs.npy"))

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Perplexities on the validation windows, at the lambda that is best there; the model is in training mode before and after."""
        memory = label_logprobs(model.eval(), self.valid, "validation", windows(len(self.valid), VALIDATED))
        model.train()
        lam = best_lambda(self.base, memory)
        return {"lambda": lam, **figures(self.base, memory, lam)}


def write_validation(out: Path, tokens: Path, base: Path, manifest: Manifest) -> Path:
    """Write logprobs.npy: the base's log-probabilities of the tokens on which learning curves are measured."""
    with stage(out, manifest) as folder:
        if folder is not None and parallel.rank() == 0:
            valid = load_tokens(tokens, "valid")
            np.save(folder / "logprobs.npy", label_logprobs(load_model(base), valid, "valid base", windows(len(valid), VALIDATED)))
    return out
