"""A composite's n-gram memories, by slot, and the mixture of their rows, for which they need the text before each row."""

import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from memdec.decoders.reading.ngram import NgramMemory
from memdec.server.model.mixing import mix, mix_both, mix_sparse
from memdec.server.model.packing import places
from memdec.server.model.routing import NO_DOMAIN, Beside, positions_by_slot
from memdec.server.model.text import StepText
from memdec.server.model.timing import StepTimes
from memdec.server.retrieval.ngram import SparseRows, look_up
from memdec.server.routing.domains import Shares

PATIENCE = 0.005  # seconds that the worker waits, between two steps, for a memory that is being opened


class NgramMemories:
    """The n-gram memories that are loaded; they are added and removed between steps."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.loaded: dict[int, NgramMemory] = {}
        self.text: StepText | None = None
        """The text of the step, set by the runner's adapter where a request has such a memory."""
        for slot, path in paths.items():
            self.loaded[slot] = NgramMemory.open(Path(path))

    def unload(self, slot: int) -> None:
        """Close a slot's package."""
        self.loaded.pop(slot, None)

    def mixed(self, slot: int, logits: Tensor, lams: Tensor, rows: Tensor, times: StepTimes) -> Tensor:
        """Mixed logits [n, V] float32 of the packed rows [n, ...] of one slot, whose lambdas [n] are above 0."""
        if slot not in self.loaded or self.text is None:  # vLLM's profiling
            return logits.float()
        with times.part("ngram", logits.device):
            found = self._found(slot, rows)
        with times.part("mixing", logits.device):
            return mix_sparse(logits, found.rows, found.tokens, found.probabilities, found.base_mass, lams)

    def besides(self, rows: Tensor) -> list[Beside | None]:
        """What each of the packed rows [n, ...] has beside its decoder; [] if no request of the step has anything."""
        text = self.text
        if text is None or not any(text.besides):
            return []
        return [text.beside(place) for place in places(rows).tolist()]

    def mixed_beside(
        self, besides: Sequence[Beside | None], logits: Tensor, own: Tensor, lams: Tensor, rows: Tensor, times: StepTimes
    ) -> Tensor:
        """Mixed logits [n, V] float32 of the rows of one decoder, whose logits are `own` [n, Vm]; some rows have an n-gram memory beside it."""
        mixed = torch.empty_like(logits, dtype=torch.float32)
        slots = torch.tensor([beside.slot if beside is not None else NO_DOMAIN for beside in besides])
        alone = (slots == NO_DOMAIN).nonzero().squeeze(1).to(rows.device)
        if len(alone):
            with times.part("mixing", rows.device):
                mixed[alone] = mix(logits[alone], own[alone], lams[alone])
        for slot, index in positions_by_slot(slots, rows.device):
            shares = [beside.shares for i in index.tolist() if (beside := besides[i]) is not None]
            mixed[index] = self._mixed_both(slot, shares, logits[index], own[index], lams[index], rows[index], times)
        return mixed

    def _mixed_both(
        self, slot: int, shares: Sequence[Shares], logits: Tensor, own: Tensor, lams: Tensor, rows: Tensor, times: StepTimes
    ) -> Tensor:
        """Mixed logits [n, V] float32 of rows with one decoder and one n-gram memory; `shares` [n] are each row's of its lambda."""
        with times.part("ngram", logits.device):
            found = self._found(slot, rows, [tuple(ngram for _, ngram in of_row[1:]) for of_row in shares])
            decoder = [of_row[matched][0] for of_row, matched in zip(shares, found.matched, strict=True)]
        with times.part("mixing", logits.device):
            return mix_both(logits, own, found, lams, torch.tensor(decoder, dtype=torch.float64, device=logits.device))

    def _found(self, slot: int, rows: Tensor, weights: Sequence[tuple[float, ...] | None] = ()) -> SparseRows:
        """What a slot's memory says after the text of each packed row."""
        memory, text = self.loaded[slot], self.text
        contexts = [text.up_to(place, memory.order - 1) if text is not None else [] for place in places(rows).tolist()]
        return look_up(memory, contexts, rows.device, weights)


class StagedNgrams:
    """A memory that is being opened, in a thread of its own: all its bytes are hashed, which no step of the engine waits for."""

    def __init__(self, memories: NgramMemories, slot: int, path: Path, revision: str) -> None:
        """`revision`: the one that was checked; any other is refused."""
        self.memories, self.slot, self.revision = memories, slot, revision
        self.answer: queue.SimpleQueue[NgramMemory | Exception] = queue.SimpleQueue()
        self.memory: NgramMemory
        """What `install` puts into the slot; there once `load` has returned True."""
        threading.Thread(target=self._open, args=(path,), name="n-gram opener", daemon=True).start()

    def load(self, _budget: int) -> bool | None:
        """True once the memory is open, None before. Raises what opening it raised, and ValueError if it is another revision than was checked."""
        try:
            opened = self.answer.get(timeout=PATIENCE)
        except queue.Empty:
            return None
        if isinstance(opened, Exception):
            raise opened
        if opened.revision != self.revision:
            raise ValueError(f"its files are of revision {opened.revision}, {self.revision} was checked")
        self.memory = opened
        return True

    def install(self) -> None:
        """Put the memory into its slot."""
        self.memories.loaded[self.slot] = self.memory

    def discard(self) -> None:
        """Do nothing: the thread ends by itself."""

    def _open(self, path: Path) -> None:
        try:
            self.answer.put(NgramMemory.open(path))
        except Exception as error:  # of whatever kind: `load` raises it
            self.answer.put(error)
