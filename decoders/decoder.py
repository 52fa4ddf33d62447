"""Stage 7: the memory decoder: the student, trained on to imitate the kNN distributions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdec.decoders import parallel
from memdec.decoders.loss import soft_targets
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.models import load_model, save_model
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import Schedule, Targets, plain_targets, train


@dataclass(frozen=True)
class KnnTargets:
    """Sparse kNN rows [entries, K] on disk, mixed with the labels: row i belongs to the token after position i."""

    ids: NDArray[np.unsignedinteger]
    probs: NDArray[np.float16]
    beta: float

    @classmethod
    def open(cls, folder: Path, beta: float) -> "KnnTargets":
        """Memory-map a stage-5 artifact."""
        return cls(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "probs.npy", mmap_mode="r"), beta)

    def __call__(self, starts: NDArray[np.int64], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of windows at `starts` [B] with labels [B, T]: ids and probs [B * T, K + 1]."""
        span = labels.shape[1]
        ids = np.concatenate([self.ids[s : s + span] for s in starts]).astype(np.int64)
        probs = np.concatenate([self.probs[s : s + span] for s in starts]).astype(np.float32)
        return soft_targets(labels.reshape(-1).cpu(), torch.from_numpy(ids), torch.from_numpy(probs), self.beta)


def write_decoder(out: Path, store: Path, targets: Path, student: Path, schedule: Schedule, beta: float, manifest: Manifest) -> Path:
    """Train the student on beta * kNN + (1 - beta) * labels (arXiv 2508.09874, eq. 6), over the text that the datastore covers."""
    return _train_on(out, student, np.load(store / "tokens.npy", mmap_mode="r"), schedule, KnnTargets.open(targets, beta), manifest)


def write_control(out: Path, tokens: Path, student: Path, schedule: Schedule, manifest: Manifest) -> Path:
    """The sceptic's control: the decoder's twin, from the same student, for as many tokens, on the labels alone.

    It needs no datastore, so it gets all of the training text.
    """
    return _train_on(out, student, load_tokens(tokens, "train"), schedule, plain_targets, manifest)


def _train_on(out: Path, student: Path, ids: Ids, schedule: Schedule, targets: Targets, manifest: Manifest) -> Path:
    with stage(out, manifest) as folder:
        if folder is not None:
            model = load_model(student)
            train(model, ids, schedule, out.name, targets=targets, folder=folder)
            if parallel.rank() == 0:
                save_model(model, folder, load_tokenizer(student), torch.bfloat16)
    return out
