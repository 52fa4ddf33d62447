"""Stage 7: the memory decoder: the student, trained on to imitate the kNN distributions, or for the mixture with the base."""

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
from memdec.decoders.objectives import LABELS, Imitation, Mixture, Objective
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.start import freeze_embeddings
from memdec.decoders.tokens import load_tokens
from memdec.decoders.train import Schedule, Validation, train


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


@dataclass(frozen=True)
class Run:
    """Settings of a second phase of training: the student it starts from, the schedule, and a learning curve to record."""

    student: Path
    schedule: Schedule
    base: Path | None = None
    """The base, if the student started from a pretrained model: embeddings equal to the base's are not trained."""
    curve: Validation | None = None

    def write(self, out: Path, ids: Ids, objective: Objective, manifest: Manifest) -> Path:
        """Train on `ids` [tokens] and write a Hugging Face folder in bfloat16."""
        with stage(out, manifest) as folder:
            if folder is not None:
                model = load_model(self.student)
                if self.base is not None:
                    freeze_embeddings(model, self.base)
                train(model, ids, self.schedule, out.name, objective, folder, self.curve)
                if parallel.rank() == 0:
                    save_model(model, folder, load_tokenizer(self.student), torch.bfloat16)
        return out


def write_decoder(out: Path, store: Path, targets: Path, run: Run, beta: float, manifest: Manifest) -> Path:
    """Train the student on beta * kNN + (1 - beta) * labels (arXiv 2508.09874, eq. 6), over the text that the datastore covers."""
    return run.write(out, np.load(store / "tokens.npy", mmap_mode="r"), Imitation(KnnTargets.open(targets, beta)), manifest)


def write_mixed(out: Path, labels: Path, lam: float, run: Run, manifest: Manifest) -> Path:
    """Train the student on the loss of the mixture, lam * p_mem + (1 - lam) * p_base, over the text that base labels cover."""
    mixture = Mixture(np.load(labels / "logprobs.npy", mmap_mode="r"), lam)
    return run.write(out, np.load(labels / "tokens.npy", mmap_mode="r"), mixture, manifest)


def write_control(out: Path, tokens: Path, run: Run, manifest: Manifest) -> Path:
    """Train the control: the same student for as many tokens as the decoder, but on the labels alone.

    It needs no datastore, so it gets all of the training text.
    """
    return run.write(out, load_tokens(tokens, "train"), LABELS, manifest)
