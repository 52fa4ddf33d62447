"""Slots for decoders that come and go while the engine runs.

All decoders have one architecture and shape and share the first tower's attention layers, so a new one needs no place in the KV cache: its
tower is built beside those that run, filled from its files piece by piece, between steps, and put into an empty slot when it is
complete. An empty slot holds nothing. Only the first tower stays until another takes its slot: it owns the attention layers.
"""

import itertools
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import device_loading_context
from vllm.utils.torch_utils import set_default_torch_dtype

from memdec.decoders.reading.weights import read_tensors
from memdec.server.model.attention import share_attention

AHEAD = 2  # weights that are read before they are wanted
PATIENCE = 0.005  # seconds that a step may wait for one
KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightReader:
    """Reads a decoder's weights in a thread of its own, a few ahead: a disk that is slow, or hangs, holds no step of the engine up."""

    def __init__(self, folder: Path, digests: dict[str, str]) -> None:
        self.ready: queue.Queue[tuple[str, torch.Tensor] | Exception | None] = queue.Queue(AHEAD)
        self.stopped = threading.Event()
        threading.Thread(target=self._run, args=(folder, digests), name="weight reader", daemon=True).start()

    def next(self) -> tuple[str, torch.Tensor] | None:
        """The next weight, None after the last. Raises queue.Empty if none has been read yet, and whatever went wrong with reading."""
        found = self.ready.get(timeout=PATIENCE)
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        """Let the thread end, as soon as it notices."""
        self.stopped.set()

    def _run(self, folder: Path, digests: dict[str, str]) -> None:
        try:
            for tensor, data in read_tensors(folder, digests):
                kind = KINDS[tensor.dtype]
                weight = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
                if not self._hand_over((tensor.name, weight.view(tensor.shape))):
                    return
            self._hand_over(None)
        except Exception as error:
            self._hand_over(error)

    def _hand_over(self, found: tuple[str, torch.Tensor] | Exception | None) -> bool:
        """Wait for room; returns whether anybody still wants it."""
        while not self.stopped.is_set():
            try:
                self.ready.put(found, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


class StagedTower:
    """A decoder on its way into a slot of a composite."""

    def __init__(
        self, composite: Any, slot: int, path: Path, digests: dict[str, str], model_config: ModelConfig, device: torch.device
    ) -> None:
        """`digests`: the files of `path` that hold its weights, and the SHA-256 that they must turn out to have."""
        self.composite, self.slot, self.model_config, self.device = composite, slot, model_config, device
        self.registered: dict[str, Any] = composite.later.compilation_config.static_forward_context
        self.own: set[str] = set()
        self.reader: WeightReader | None = None
        try:
            self.tower: Any = self._built()
        except BaseException:
            self.discard()
            raise
        self.reader = WeightReader(path, digests)
        self.work = itertools.chain(self._copy(self.reader), self._finish())

    def _built(self) -> Any:
        """The tower without its weights."""
        before = set(self.registered)
        try:
            with set_default_torch_dtype(self.model_config.dtype), self.device:
                tower = self.composite.later_tower()
        finally:
            self.own = set(self.registered) - before
        share_attention([self.composite.towers[0], tower], self.registered)
        if self.composite.stacked is not None:
            self.composite.stacked.adopt(self.slot, tower)
        return tower

    def load(self, budget: int) -> bool | None:
        """Do the work for about `budget` bytes of weights; returns whether that was the last, or None if there was nothing to do yet.

        Raises ValueError if a weight is missing, and PackageError if the files are not those that were checked.
        """
        done = 0
        with set_default_torch_dtype(self.model_config.dtype):
            for size in self.work:
                if size is None:
                    return None if not done else False
                done += size
                if done >= budget:
                    return False
        return True

    def install(self) -> None:
        """Put the complete tower into its slot."""
        self.composite.replace_tower(self.slot, self.tower.eval())

    def discard(self) -> None:
        """Leave everything as it was before."""
        if self.reader is not None:
            self.reader.stop()
        for name in self.own:
            self.registered.pop(name, None)

    def _copy(self, reader: WeightReader) -> Iterator[int | None]:
        """Copy the weights as they are read; yields the bytes of each, and None where none is there yet."""
        wanted, loaded = {name for name, _ in self.tower.named_parameters()}, set[str]()
        while True:
            try:
                found = reader.next()
            except queue.Empty:
                yield None
                continue
            if found is None:
                break
            names = self.tower.load_weights(iter([found]))
            loaded |= wanted if names is None else names  # None: a model that doesn't say
            yield found[1].nbytes
        if missing := sorted(wanted - loaded):
            raise ValueError(f"weight {missing[0]} is not in its files")

    def _finish(self) -> Iterator[int]:
        """Bring the weights into the form that kernels want, as vLLM does it after loading a model; yields the bytes of each layer."""
        for module in self.tower.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                size = sum(weight.nbytes for weight in module.parameters(recurse=False))
                with device_loading_context(module, self.device):
                    method.process_weights_after_loading(module)
                yield size
        if hasattr(self.tower, "process_weights_after_loading"):
            self.tower.process_weights_after_loading()
