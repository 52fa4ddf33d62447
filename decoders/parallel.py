"""One training job in several processes, as `torchrun` starts them; in a single process every function here does nothing.

Rank 0 makes folders, checkpoints and models; embedding and searching are split by position, training by window. All ranks see
the same file system.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, distributed


def join() -> None:
    """Join the group that torchrun's environment describes, once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leave the group, if in one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """Rank of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait until every process has reached this call."""
    if distributed.is_initialized():
        distributed.barrier()


def share(count: int, step: int = 1) -> tuple[int, int]:
    """Range [start, end) of `count` items that falls to this process; ranges begin at multiples of `step`."""
    steps = -(-count // step)
    return min(count, steps * rank() // world() * step), min(count, steps * (rank() + 1) // world() * step)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    distributed.all_reduce(flat)
    flat /= world()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
