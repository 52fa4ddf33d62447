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
from typing import TYPE_CHECKING

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import device_loading_context
from vllm.utils.torch_utils import set_default_torch_dtype

from memdec.decoders.reading.weights import read_tensors
from memdec.server.model.attention import share_attention
from memdec.server.model.tower import Tower

if TYPE_CHECKING:
    from memdec.server.model.composite import MemoryDecoderForCausalLM

AHEAD = 2  # weights that are read ahead of their use
PATIENCE = 0.005  # seconds that the worker waits for a weight between two steps
KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightReader:
    """Reads a decoder's weights ahead in a thread of its own, so that a slow or hanging disk delays no step of the engine."""

    def __init__(self, folder: Path, digests: dict[str, str]) -> None:
        self.ready: queue.Queue[tuple[str, torch.Tensor] | Exception | None] = queue.Queue(AHEAD)
        self.stopped = threading.Event()
        threading.Thread(target=self._run, args=(folder, digests), name="weight reader", daemon=True).start()

    def next(self) -> tuple[str, torch.Tensor] | None:
        """The next name and weight; None after the last. Raises queue.Empty if none has been read yet, and the exception that ended the reading."""
        item = self.ready.get(timeout=PATIENCE)
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """Tell the thread to end; it does so within 0.1 s, or when the disk answers."""
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

    def _hand_over(self, item: tuple[str, torch.Tensor] | Exception | None) -> bool:
        """Put an item into the queue when it has room; returns False if the reader was stopped first."""
        while not self.stopped.is_set():
            try:
                self.ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


class StagedTower:
    """A decoder that is being loaded, and will be put into a slot of a composite."""

    def __init__(
        self,
        composite: "MemoryDecoderForCausalLM",
        slot: int,
        path: Path,
        digests: dict[str, str],
        model_config: ModelConfig,
        device: torch.device,
    ) -> None:
        """`digests`: the files of `path` that hold its weights, and the SHA-256 that each must have."""
        self.composite, self.slot, self.model_config, self.device = composite, slot, model_config, device
        self.registered: dict[str, object] = composite.later.compilation_config.static_forward_context
        self.own: set[str] = set()
        self.reader: WeightReader | None = None
        try:
            self.tower = self._built()
        except BaseException:
            self.discard()
            raise
        self.reader = WeightReader(path, digests)
        self.work = itertools.chain(self._copy(self.reader), self._finish())

    def _built(self) -> Tower:
        """Build the tower without its weights, sharing the first tower's attention layers."""
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
        """Load about `budget` bytes of weights; returns whether the tower is complete, or None if no weight has been read yet.

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
        """Stop the reader, and take this tower's layers off vLLM's register."""
        if self.reader is not None:
            self.reader.stop()
        for name in self.own:
            self.registered.pop(name, None)

    def _copy(self, reader: WeightReader) -> Iterator[int | None]:
        """Copy the weights as they are read; yields the bytes of each, and None while the next one has not been read."""
        wanted, loaded = {name for name, _ in self.tower.named_parameters()}, set[str]()
        while True:
            try:
                item = reader.next()
            except queue.Empty:
                yield None
                continue
            if item is None:
                break
            names = self.tower.load_weights(iter([item]))
            loaded |= wanted if names is None else names  # None: this model doesn't return names
            yield item[1].nbytes
        if missing := sorted(wanted - loaded):
            raise ValueError(f"weight {missing[0]} is not in its files")

    def _finish(self) -> Iterator[int]:
        """Process the weights layer by layer, as vLLM does after loading a model; yields the bytes of each layer."""
        for module in self.tower.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                size = sum(weight.nbytes for weight in module.parameters(recurse=False))
                with device_loading_context(module, self.device):
                    method.process_weights_after_loading(module)
                yield size
        if hasattr(self.tower, "process_weights_after_loading"):
            self.tower.process_weights_after_loading()
