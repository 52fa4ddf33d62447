"""Stage 5: the memory decoder: first plain language modelling on the domain, then imitation of the kNN distributions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoders.loss import soft_targets
from decoders.manifest import Manifest, stage
from decoders.pretrain import Shape, new_model
from decoders.tokenizer import load_tokenizer
from decoders.tokens import load_tokens
from decoders.train import Schedule, train


@dataclass(frozen=True)
class KnnTargets:
    """Sparse kNN rows [entries, K] on disk, mixed with the labels: row i belongs to the token after position i."""

    ids: NDArray[np.unsignedinteger]
    probs: NDArray[np.float16]
    beta: float

    @classmethod
    def open(cls, folder: Path, beta: float) -> "KnnTargets":
        """Memory-map a stage-4 artifact."""
        return cls(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "probs.npy", mmap_mode="r"), beta)

    def __call__(self, starts: NDArray[np.int64], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of windows at `starts` [B] with labels [B, T]: ids and probs [B * T, K + 1]."""
        span = labels.shape[1]
        ids = np.concatenate([self.ids[s : s + span] for s in starts]).astype(np.int64)
        probs = np.concatenate([self.probs[s : s + span] for s in starts]).astype(np.float32)
        probs /= probs.sum(1, keepdims=True)  # float16 rows sum to 1 only roughly
        return soft_targets(labels.reshape(-1).cpu(), torch.from_numpy(ids), torch.from_numpy(probs), self.beta)


def write_decoder(
    out: Path,
    tokens: Path,
    targets: Path,
    tokenizer: Path,
    shape: Shape,
    first: Schedule,
    second: Schedule,
    beta: float,
    manifest: Manifest,
) -> Path:
    """Train a decoder of `shape` from scratch: `first` on the labels alone, `second` on beta * kNN + (1 - beta) * labels."""
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        ids = load_tokens(tokens, "train")
        vocabulary = load_tokenizer(tokenizer)
        model = new_model(shape, vocabulary, first.seed)
        train(model, ids, first, "decoder on text", log=folder / "text.jsonl")
        knn = KnnTargets.open(targets, beta)
        train(model, ids[: len(knn.ids)], second, "decoder on kNN", targets=knn, log=folder / "knn.jsonl")
        model.to(torch.bfloat16).save_pretrained(folder)
        vocabulary.save_pretrained(folder)
    return out
