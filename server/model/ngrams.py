"""A composite's n-gram memories, by slot, and the mixture of their rows, for which they need the text before each row."""

import queue
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from memdec.decoders.reading.ngram import NgramMemory
from memdec.server.model.mixing import mix, mix_both, mix_sparse
from memdec.server.model.packing import places
from memdec.server.model.routing import NO_DOMAIN, Beside, RowChoice, positions_by_slot
from memdec.server.model.text import StepText
from memdec.server.model.timing import StepTimes
from memdec.server.retrieval.ngram import Known, SparseRows, Weights, look_up

PATIENCE = 0.005  # seconds that the worker waits, between two steps, for a memory that is being opened


class NgramMemories:
    """The n-gram memories that are loaded; they are added and removed between steps."""

    text: StepText | None = None
    """The text of the step; None: none of its requests has such a memory."""
    ahead: Future[dict[int, Known]] | None = None
    """The look-ups that run during the forward pass, by slot."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.loaded: dict[int, NgramMemory] = {}
        self.pool = ThreadPoolExecutor(1, "n-gram look-up")
        for slot, path in paths.items():
            self.loaded[slot] = NgramMemory.open(Path(path))

    def unload(self, slot: int) -> None:
        """Close a slot's package."""
        self.loaded.pop(slot, None)

    def begin(self, text: StepText | None, rows: Sequence[RowChoice] = (), most: int = 1) -> None:
        """Take the text of a step and its requests' choices, and begin the look-ups that its logits will need, beside the forward pass.

        A request with at most `most` tokens in the step (one, and its drafts) needs one after each of them. Of others, which are prompts, only
        the last token's is begun: few requests ask for the logits of the rest.
        """
        self.text, self.ahead = text, None
        if text is None or not text.early:
            return
        contexts = []
        for start, row in zip(text.starts, rows, strict=True):
            slot = row.slot if row.beside is None else row.beside.slot
            if row.lam and slot in self.loaded:
                places = range(start if row.tokens <= most else start + row.tokens - 1, start + row.tokens)
                contexts += [(slot, self._context(slot, text, place), weights_of(row.beside)) for place in places]
        if contexts:
            self.ahead = self.pool.submit(self._look_ahead, contexts)

    def _look_ahead(self, contexts: Sequence[tuple[int, tuple[int, ...], Weights | None]]) -> dict[int, Known]:
        known: dict[int, Known] = defaultdict(dict)
        for slot, context, weights in contexts:
            if (context, weights) not in known[slot]:
                known[slot][context, weights] = self.loaded[slot].continuations(context, weights)
        return known

    def mixed(self, slot: int, logits: Tensor, lams: Tensor, rows: Tensor, times: StepTimes) -> Tensor:
        """Mixed logits [n, V] float32 of the packed rows [n, ...] of one slot, whose lambdas [n] are above 0."""
        if slot not in self.loaded or self.text is None:  # vLLM's profiling
            return logits.float()
        with times.part("ngram", logits.device):
            found = self._found(slot, rows)
        with times.part("mixing", logits.device):
            return mix_sparse(logits, found.rows, found.tokens, found.probabilities, found.base_mass, lams)

    def besides(self, rows: Tensor) -> list[Beside | None]:
        """The n-gram memory that each of the packed rows [n, ...] mixes in besides its decoder; [] if no request of the step has mode `both`."""
        text = self.text
        if text is None or not any(text.besides):
            return []
        return [text.beside(place) for place in places(rows).tolist()]

    def mixed_beside(
        self, besides: Sequence[Beside | None], logits: Tensor, own: Tensor, lams: Tensor, rows: Tensor, times: StepTimes
    ) -> Tensor:
        """Mixed logits [n, V] float32 of the rows of one decoder, whose logits are `own` [n, Vm]; some rows mix in an n-gram memory, too."""
        mixed = torch.empty_like(logits, dtype=torch.float32)
        slots = torch.tensor([beside.slot if beside is not None else NO_DOMAIN for beside in besides])
        alone = (slots == NO_DOMAIN).nonzero().squeeze(1).to(rows.device)
        if len(alone):
            with times.part("mixing", rows.device):
                mixed[alone] = mix(logits[alone], own[alone], lams[alone])
        for slot, index in positions_by_slot(slots, rows.device):
            of_slot = [beside for i in index.tolist() if (beside := besides[i]) is not None]
            mixed[index] = self._mixed_both(slot, of_slot, logits[index], own[index], lams[index], rows[index], times)
        return mixed

    def _mixed_both(
        self, slot: int, besides: Sequence[Beside], logits: Tensor, own: Tensor, lams: Tensor, rows: Tensor, times: StepTimes
    ) -> Tensor:
        """Mixed logits [n, V] float32 of rows with one decoder and one n-gram memory, which share its lambda as `besides` [n] says."""
        with times.part("ngram", logits.device):
            found = self._found(slot, rows, [weights_of(beside) for beside in besides])
            decoder = [beside.shares[matched][0] for beside, matched in zip(besides, found.matched, strict=True)]
        with times.part("mixing", logits.device):
            return mix_both(logits, own, found, lams, torch.tensor(decoder, dtype=torch.float64, device=logits.device))

    def _found(self, slot: int, rows: Tensor, weights: Sequence[Weights | None] = ()) -> SparseRows:
        """What a slot's memory says after the text of each packed row."""
        text = self.text
        contexts = [self._context(slot, text, place) if text is not None else () for place in places(rows).tolist()]
        known = self.ahead.result()[slot] if self.ahead is not None else {}
        return look_up(self.loaded[slot], contexts, rows.device, known, weights)

    def _context(self, slot: int, text: StepText, place: int) -> tuple[int, ...]:
        """The last tokens up to a place in the step, as many as the slot's memory looks at."""
        return tuple(text.up_to(place, self.loaded[slot].order - 1))


def weights_of(beside: Beside | None) -> Weights | None:
    """The weights that take the place of an n-gram memory's own where it shares lambda with a decoder."""
    return None if beside is None else tuple(ngram for _, ngram in beside.shares[1:])


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
