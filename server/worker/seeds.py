"""Requests with a seed on CPUs, in steps whose token of theirs is discarded: those of every part of a prompt but the last, of a preempted text too.

vLLM's V1 runner samples a token there as well, and takes the draw back by moving the generator's offset. A CPU's generator has none: vLLM raises, and
the engine ends, whoever asked. Here the generator's state from before the draw is put back, so that a seed gives the same answer however the prompt
is divided. To be dropped when vLLM does so itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from memdec.server.in_place import overwrite


class RewindsSeeds:
    """Mixin for the CPU's V1 runner."""

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; generators of discarded tokens are as before."""
        states = [(generator, generator.get_state()) for generator in self._of_discarded().values()]
        output = super()._sample(*args, **kwargs)  # type: ignore[misc]
        for generator, state in states:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, which sees no generator that it would take a draw back from."""
        runner: GPUModelRunner = self
        hidden, generators = self._of_discarded(), runner.input_batch.generators
        for row in hidden:
            del generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        finally:
            generators.update(hidden)

    def _of_discarded(self) -> dict[int, torch.Generator]:
        """Row -> generator of the requests whose sampled token the step discards."""
        runner: GPUModelRunner = self
        batch = runner.input_batch
        if not batch.generators:
            return {}
        rows = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        return {row: batch.generators[row] for row in rows if row in batch.generators}


class SeededCPUModelRunner(RewindsSeeds, CPUModelRunner):
    """The runner of a base without memories."""


class SeededCPUWorker(cpu_worker.CPUWorker):
    """`worker_cls` on CPUs for a base without memories."""

    def init_device(self) -> None:
        """Build the runner above where vLLM would build its own."""
        with replaced(cpu_worker, "CPUModelRunner", SeededCPUModelRunner):
            super().init_device()


@contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Replace a module's attribute for a moment."""
    original = getattr(module, name)
    overwrite(module, name, value)
    try:
        yield
    finally:
        overwrite(module, name, original)
