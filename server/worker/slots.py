"""Slots in the worker: a request's slot and lambda, and the methods by which the front end changes slots, on every worker between two steps."""

from collections.abc import Mapping
from pathlib import Path

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from memdec.server.choice import MemoryChoice
from memdec.server.model.ngrams import StagedNgrams
from memdec.server.model.routing import NOTHING, Beside, Chosen
from memdec.server.model.slots import StagedTower
from memdec.server.routing.domains import BOTH, DECODER, NGRAM


def chosen(choice: MemoryChoice | None, slots: Mapping[tuple[str, str], int]) -> Chosen:
    """What a request mixes in; `slots` are those at the start, by mode and domain."""
    if choice is None or not choice.mixed:
        return NOTHING
    if choice.mode != BOTH:
        return Chosen(choice.slot or slots[choice.mode, choice.domain], choice.lam)
    beside = Beside(choice.beside or slots[NGRAM, choice.domain], choice.shares)
    return Chosen(choice.slot or slots[DECODER, choice.domain], choice.lam, beside)


class HoldsSlots:
    """Mixin for workers: loads memories into slots, and unloads them. Failures are returned as text: some executors end at a worker's exception."""

    staged: StagedTower | StagedNgrams | None = None

    def stage_decoder(self, slot: int, path: str, digests: dict[str, str]) -> str | None:
        """Build an empty tower for a slot, and begin to read its files (name -> SHA-256); returns what went wrong, or None."""
        worker: WorkerBase = self
        self.discard_staged()
        model, config = worker.model_runner.get_model(), worker.vllm_config.model_config
        try:
            self.staged = StagedTower(model, slot, Path(path), digests, config, worker.device)
        except Exception as error:  # of whatever kind a model's constructor raises
            return failure_text(error)
        return None

    def stage_ngrams(self, slot: int, path: str, revision: str) -> str | None:
        """Begin to open an n-gram memory for a slot; returns what went wrong, or None."""
        worker: WorkerBase = self
        self.discard_staged()
        self.staged = StagedNgrams(worker.model_runner.get_model().ngrams, slot, Path(path), revision)
        return None

    def load_staged(self, budget: int) -> bool | str | None:
        """Load about `budget` bytes of what is staged; returns whether it is complete, None if nothing has been read yet, or what went wrong."""
        try:
            return self._present().load(budget)
        except Exception as error:  # of whatever kind a model's loader raises
            return failure_text(error)

    def install_staged(self) -> None:
        """Put the staged memory into its slot: from now on requests may use it."""
        self._present().install()
        self.staged = None

    def discard_staged(self) -> None:
        """Drop what is staged, if anything is."""
        if self.staged is not None:
            self.staged.discard()
            self.staged = None

    def _present(self) -> StagedTower | StagedNgrams:
        """What is staged. Raises RuntimeError if nothing is."""
        if self.staged is None:
            raise RuntimeError("no memory is staged")
        return self.staged

    def free_slot(self, slot: int) -> bool:
        """Unload a slot's memory, unless a request that the worker knows uses it still: returns whether it is free."""
        worker: WorkerBase = self
        runner = worker.model_runner
        if isinstance(runner, GPUModelRunner):  # V1's, of CPUs too
            memories = [getattr(request, "memory", NOTHING) for request in runner.requests.values()]
        else:
            memories = list(runner.model_state.chosen.values())
        if any(slot in used.slots for used in memories):
            return False
        runner.get_model().release(slot)
        return True


def failure_text(error: Exception) -> str:
    """One line that says what went wrong; many of vLLM's assertions have no message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
