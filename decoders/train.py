"""The training loop of base, teacher, student and decoder; they differ in model, targets and schedule alone."""

import contextlib
import ctypes
import errno
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from memdec.decoders import parallel
from memdec.decoders.head import Head
from memdec.decoders.manifest import BOOKMARK, write_whole
from memdec.decoders.objectives import LABELS, Objective
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.errors import CorpusError, OptionError
from memdec.decoders.reading.tokenizer import first_line


class Validation(Protocol):
    """A learning curve: what is measured while a model trains."""

    @property
    def every(self) -> int:
        """Training tokens from one measurement to the next."""

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Measure a model that is in training mode, before and after."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    tokens: int
    """Training tokens in all, over all epochs."""
    window: int = 512
    """Context length in tokens."""
    batch: int = 16
    """Windows per step."""
    stretched: float = 0.1
    """Share of the steps, at the end, whose windows are twice as long and half as many, so that the model learns long contexts too."""
    matrix_lr: float = 0.02
    """Peak learning rate of the hidden matrices (Muon); 0: AdamW trains them too, at the rate of the rest."""
    other_lr: float = 3e-3
    """Peak learning rate of embeddings, norms and biases (AdamW)."""
    warmup: float = 0.02
    """Share of the steps, at the beginning, in which the learning rate rises from 0."""
    cooldown: float = 0.6
    """Share of the steps, at the end, in which the learning rate falls to 0."""
    seed: int = 0
    """Seed of the order of the windows."""

    def to_dict(self) -> dict[str, float]:
        """The fields as a dict, for a manifest."""
        return asdict(self)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return max(1, self.tokens // (self.window * self.batch))

    def shape(self, step: int) -> tuple[int, int]:
        """Windows, and tokens per window, at a step."""
        if step < self.steps * (1 - self.stretched):
            return self.batch, self.window
        return max(1, self.batch // 2), 2 * self.window

    def passes(self, step: int, every: int) -> bool:
        """Whether a step reaches the next multiple of `every` tokens, or is the last."""
        size = self.window * self.batch
        return (step + 1) * size // every > step * size // every or step == self.steps - 1

    def rate(self, step: int) -> float:
        """Learning-rate factor at a step, from 0 to 1: a trapezoid of warm-up, constant rate and cooldown."""
        up = (step + 1) / max(1, self.warmup * self.steps)
        down = (self.steps - step) / max(1, self.cooldown * self.steps)
        return min(1.0, up, down)


def train(
    model: PreTrainedModel,
    ids: Ids,
    schedule: Schedule,
    what: str,
    objective: Objective = LABELS,
    folder: Path | None = None,
    curve: Validation | None = None,
) -> None:
    """Train `model` in place on the flat token array `ids` [tokens]; ends in eval mode.

    Uses bf16 autocast where that is fast, Muon for hidden matrices (torch.optim.Muon) and AdamW for the rest. With a `folder`,
    a JSON line every 20 steps goes to `<what>.jsonl` there, a checkpoint is saved every `Checkpoint.SECONDS`, and what `curve` measures
    goes to `<what>.curve.jsonl`, with tokens and seconds of training; a run that is killed and started again resumes from the checkpoint
    and ends with the same weights. Under torchrun every process takes its share of each batch.
    """
    device = next(model.parameters()).device
    precision = fast_precision(device)
    keep_freed_memory()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, schedule)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    batches = _Batches(len(ids), schedule.seed)
    if len(ids) <= 2 * schedule.window + 1:
        raise CorpusError(f"{what}: {len(ids):,} tokens to train on, wanted more than {2 * schedule.window + 1:,}")
    checkpoint = Checkpoint(folder, what, model, optimizers, batches)
    head = Head.of(model.eval()).restricted()
    model.train()
    length = schedule.steps * schedule.window * schedule.batch
    first = checkpoint.load()
    with progress(what, length, " tokens", first * schedule.window * schedule.batch) as bar:
        for step in range(first, schedule.steps):
            batch, length = schedule.shape(step)
            taken = batches.next(batch, length)
            starts = taken[parallel.rank() :: parallel.world()]
            windows = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64)).to(device)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                hidden = model.base_model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
            loss = objective(head, hidden.reshape(-1, hidden.shape[-1]), starts, windows[:, 1:], precision)
            (loss * (len(starts) * parallel.world() / len(taken))).backward()
            parallel.average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            factor = schedule.rate(step)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, peak, strict=True):
                    group["lr"] = lr * factor
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update(schedule.window * schedule.batch)
            if step % 20 == 0 or step == schedule.steps - 1:
                checkpoint.history.append({"step": step, "loss": round(loss.item(), 4)})
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if not math.isfinite(loss.item()):
                    raise OptionError(f"{what}: the loss became {loss.item()} at step {step}; a lower learning rate is wanted")
            if curve is not None and parallel.rank() == 0 and schedule.passes(step, curve.every):
                checkpoint.measured(curve.measure(model), (step + 1) * schedule.window * schedule.batch)
            checkpoint.save_if_due(step + 1)
    checkpoint.finish()
    model.eval()


class Checkpoint:
    """The state of a training on disk: weights, optimizers, position in the data. A resumed run ends with the same weights."""

    SECONDS = 60.0

    def __init__(
        self, folder: Path | None, what: str, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], batches: "_Batches"
    ) -> None:
        name = what.replace(" ", "-")
        self.path = folder / f"{name}{BOOKMARK}" if folder else None
        self.log = folder / f"{name}.jsonl" if folder else None
        self.model, self.optimizers, self.batches = model, optimizers, batches
        self.history: list[dict[str, float]] = []
        self.curve: list[dict[str, float]] = []
        self.curve_file = folder / f"{name}.curve.jsonl" if folder else None
        self.saved = self.started = time.monotonic()

    def load(self) -> int:
        """Load what a killed run saved; returns the number of steps that are done."""
        if self.path is None or not self.path.is_file():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.batches.load(state["batches"])
        self.history, self.curve = state["history"], state.get("curve", [])
        self.started -= state.get("seconds", 0.0)
        return int(state["step"])

    def _trained(self) -> dict[str, torch.Tensor]:
        """The model's state without the parameters that aren't trained."""
        frozen = {p.data_ptr() for p in self.model.parameters() if not p.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if value.data_ptr() not in frozen}

    def save_if_due(self, step: int) -> None:
        """Save once enough seconds have passed."""
        if self.path is None or parallel.rank() != 0 or time.monotonic() - self.saved < self.SECONDS:
            return
        state = {
            "step": step,
            "model": self._trained(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "batches": self.batches.state(),
            "history": self.history,
            "curve": self.curve,
            "seconds": time.monotonic() - self.started,
        }
        temporary = self.path.with_suffix(".new")
        try:
            torch.save(state, temporary)
            temporary.replace(self.path)
        except RuntimeError as error:  # torch raises this on a full disk
            raise OSError(
                errno.EIO, f"the checkpoint could not be written ({first_line(error)}); is the disk full?", str(self.path)
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        self.saved = time.monotonic()

    def measured(self, figures: dict[str, float], tokens: int) -> None:
        """Record the model's figures after `tokens` training tokens, and write the curve so far."""
        self.curve.append({"tokens": tokens, "seconds": round(time.monotonic() - self.started), **figures})
        if self.curve_file is not None:
            write_whole(self.curve_file, "".join(json.dumps(row) + "\n" for row in self.curve))

    def finish(self) -> None:
        """Write the log. The checkpoint stays until its stage is finished."""
        if self.log is not None and parallel.rank() == 0:
            self.log.write_text("".join(json.dumps(row) + "\n" for row in self.history))


def progress(what: str, total: int, unit: str, done: int = 0) -> tqdm:
    """A progress bar with rate and remaining time; silent on all ranks but the first."""
    return tqdm(desc=what, total=total, initial=done, unit=unit, unit_scale=True, mininterval=5, disable=parallel.rank() != 0)


def fast_precision(device: torch.device) -> torch.dtype:
    """bfloat16 if the hardware multiplies it (2.4 times faster with AVX-512 BF16), else float32 (1.8 times faster there); measured."""
    fast = device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: returned to the system, their pages would be faulted in again at every step."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, (1 << 31) - 1)


def _optimizers(model: PreTrainedModel, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for all other parameters, tables of positions and LoRA adapters included."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [p for n, p in trained.items() if p.ndim == 2 and id(p) not in tables and "lm_head" not in n and "lora_" not in n]
    if not schedule.matrix_lr:
        matrices = []
    chosen = {id(p) for p in matrices}
    others = [p for p in trained.values() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=schedule.matrix_lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="original"))
    return [*optimizers, torch.optim.AdamW(others, lr=schedule.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


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

    def state(self) -> dict[str, Any]:
        """The state that `load` takes."""
        return {"window": self.window, "queue": self.queue.tolist(), "random": json.dumps(self.random.bit_generator.state)}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state` returned."""
        self.window, self.queue = state["window"], np.array(state["queue"], np.int64)
        self.random.bit_generator.state = json.loads(state["random"])
