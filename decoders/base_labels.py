"""The base's log-probability of each label of the training text, for the loss of the mixture."""

from pathlib import Path

import numpy as np
import torch

from memdec.decoders import parallel
from memdec.decoders.datastore import fill_from_states, spread
from memdec.decoders.head import Head
from memdec.decoders.manifest import Bookmark, Manifest, stage
from memdec.decoders.models import load_model
from memdec.decoders.reading.array_types import Floats, Ids
from memdec.decoders.tokens import load_tokens


def write_base_labels(out: Path, tokens: Path, base: Path, entries: int, manifest: Manifest) -> Path:
    """Write tokens.npy, at most about `entries` + 1 tokens of the training text, and logprobs.npy (float32, one fewer).

    logprobs[i] is log p_base(tokens[i + 1] | up to 511 tokens before it).
    """
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        ids = spread(load_tokens(tokens, "train"), entries + 1)
        count = len(ids) - 1
        model = load_model(base)
        head = Head.of(model)
        if parallel.rank() == 0:
            np.save(folder / "tokens.npy", ids)
        of_labels = lambda hidden, start: _of_labels(head, hidden, ids[start + 1 : start + 1 + len(hidden)])  # noqa: E731
        fill_from_states(folder / "logprobs.npy", np.float32, (count,), model, ids[:count], Bookmark(folder, "labels"), of_labels)
    return out


@torch.inference_mode()
def _of_labels(head: Head, hidden: torch.Tensor, labels: Ids) -> Floats:
    """Log-probabilities of labels [n] from final hidden states [n, H]."""
    parts = []
    for start in range(0, len(hidden), 512):
        rows = hidden[start : start + 512].to(head.weight.device)
        own = torch.from_numpy(labels[start : start + 512].astype(np.int64)).to(rows.device)
        parts.append(head.logits(rows).float().log_softmax(-1).gather(1, own[:, None])[:, 0].cpu().numpy())
    return np.concatenate(parts)
