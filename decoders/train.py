"""The one training loop: base, teacher and decoder differ only in their targets, model and schedule."""

import contextlib
import ctypes
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from decoders.loss import sparse_cross_entropy

Ids = NDArray[np.unsignedinteger]
# windows' start positions [B], their labels [B, T] -> sparse targets: ids and probs, each [B * T, K]
Targets = Callable[[NDArray[np.int64], Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    tokens: int
    """Training tokens in all, epochs counted in."""
    window: int = 512
    """Context length in tokens."""
    batch: int = 16
    """Windows a step."""
    stretched: float = 0.1
    """Share of the steps, the last ones, with windows twice as long and half as many, so that long contexts work too."""
    matrix_lr: float = 0.02
    """Peak learning rate of the hidden matrices (Muon)."""
    other_lr: float = 3e-3
    """Peak learning rate of embeddings, norms and biases (AdamW)."""
    warmup: float = 0.02
    """Share of the steps that the learning rate rises from 0."""
    cooldown: float = 0.6
    """Share of the steps, the last ones, in which it falls to 0."""
    seed: int = 0
    """Seed of the order of the windows."""

    def to_dict(self) -> dict[str, float]:
        """For a manifest."""
        return asdict(self)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return max(1, self.tokens // (self.window * self.batch))

    def shape(self, step: int) -> tuple[int, int]:
        """Windows and tokens a window at a step."""
        if step < self.steps * (1 - self.stretched):
            return self.batch, self.window
        return max(1, self.batch // 2), 2 * self.window

    def rate(self, step: int) -> float:
        """Learning-rate factor at a step: trapezoid, so that the peak lasts whatever the length."""
        up = (step + 1) / max(1, self.warmup * self.steps)
        down = (self.steps - step) / max(1, self.cooldown * self.steps)
        return min(1.0, up, down)


def plain_targets(_starts: NDArray[np.int64], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Targets of ordinary language modelling: all mass on the next token."""
    ids = labels.reshape(-1, 1)
    return ids, torch.ones(ids.shape)


def train(
    model: PreTrainedModel, ids: Ids, schedule: Schedule, what: str, targets: Targets = plain_targets, log: Path | None = None
) -> None:
    """Train `model` in place on the flat token array `ids` [tokens]; ends in eval mode.

    Uses bf16 autocast, Muon for hidden matrices (torch.optim.Muon) and AdamW for the rest. `log` gets a JSON line every 20 steps.
    """
    device = next(model.parameters()).device
    precision = fast_precision(device)
    keep_freed_memory()
    optimizers = _optimizers(model, schedule)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    batches = _Batches(len(ids), schedule.seed)
    model.train()
    started, history = time.monotonic(), []
    with tqdm(total=schedule.steps * schedule.window * schedule.batch, desc=what, unit=" tokens", unit_scale=True, mininterval=5) as bar:
        for step in range(schedule.steps):
            batch, length = schedule.shape(step)
            starts = batches.next(batch, length)
            windows = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64)).to(device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                hidden = model.base_model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
            target_ids, target_probs = targets(starts, windows[:, 1:])
            weight = model.get_output_embeddings().weight
            flat = hidden.reshape(-1, hidden.shape[-1]).to(precision)
            loss = sparse_cross_entropy(flat, weight.to(precision), target_ids.to(device), target_probs.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            factor = schedule.rate(step)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = lr * factor
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update(windows[:, 1:].numel())
            if step % 20 == 0 or step == schedule.steps - 1:
                history.append({"step": step, "loss": round(loss.item(), 4), "seconds": round(time.monotonic() - started, 1)})
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"{what}: the loss became {loss.item()} at step {step}; lower the learning rate")
    if log is not None:
        log.write_text("".join(json.dumps(row) + "\n" for row in history))
    model.eval()


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix units exist. Without them float32 is 1.8 times faster (measured, AVX-512 without AMX)."""
    return torch.bfloat16 if device.type != "cpu" or torch.cpu._is_amx_tile_supported() else torch.float32


def keep_freed_memory() -> None:
    """Ask glibc not to hand large freed blocks back: every step would fault the same pages in again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, (1 << 31) - 1)


def _optimizers(model: PreTrainedModel, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and p is not embedding and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=schedule.matrix_lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=schedule.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


class _Batches:
    """Start positions of windows: each epoch walks all windows in a new order, from a new offset."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.random = length, np.random.default_rng(seed)
        self.window, self.queue = 0, np.zeros(0, np.int64)

    def next(self, batch: int, window: int) -> NDArray[np.int64]:
        """The next `batch` start positions, [batch]."""
        if window != self.window:
            self.window, self.queue = window, np.zeros(0, np.int64)
        while len(self.queue) < batch:
            starts = np.arange(self.random.integers(0, window), self.length - window, window, dtype=np.int64)
            self.queue = np.concatenate([self.queue, self.random.permutation(starts)])
        taken, self.queue = self.queue[:batch], self.queue[batch:]
        return taken
