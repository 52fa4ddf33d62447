"""A composite's n-gram memories, by slot, and the mixture of their rows, for which they need the text before each row."""

import queue
import threading
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from memdec.decoders.reading.ngram import NgramMemory
from memdec.server.model.mixing import mix_sparse
from memdec.server.model.packing import places
from memdec.server.model.text import StepText
from memdec.server.model.timing import StepTimes
from memdec.server.retrieval.ngram import look_up

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
        memory, text = self.loaded.get(slot), self.text
        if memory is None or text is None:  # vLLM's profiling
            return logits.float()
        with times.part("ngram", logits.device):
            contexts = [text.up_to(place, memory.order - 1) for place in places(rows).tolist()]
            found = look_up(memory, contexts, logits.device)
        with times.part("mixing", logits.device):
            return mix_sparse(logits, found.rows, found.tokens, found.probabilities, found.base_mass, lams)


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
