"""Slots for decoders that come and go while the engine runs.

All decoders have one architecture and shape and share the first tower's attention layers, so a new one needs no place in the KV cache: its
tower is built beside those that run, filled from its files piece by piece, between steps, and put into an empty slot when it is
complete. An empty slot holds nothing. Only the first tower stays until another takes its slot: it owns the attention layers.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.utils import device_loading_context
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.utils.torch_utils import set_default_torch_dtype

from memdec.server.model.attention import share_attention
from memdec.server.routing.domains import DECODER, KNN


def slots_of(spec: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """(mode, domain) -> slot at the start: decoders from 1, datastores after the last slot that a decoder may have."""
    decoders, stores = spec["decoders"], spec.get("datastores", [])
    named = {(DECODER, d["name"]): slot for slot, d in enumerate(decoders, 1)}
    return named | {(KNN, d["name"]): slot for slot, d in enumerate(stores, capacity(spec) + 1)}


def capacity(spec: Mapping[str, Any]) -> int:
    """How many decoders may be loaded at once."""
    return max(int(spec.get("slots", 0)), len(spec["decoders"]))


class StagedTower:
    """A decoder on its way into a slot of a composite."""

    def __init__(self, composite: Any, slot: int, path: Path, model_config: ModelConfig, device: torch.device) -> None:
        self.composite, self.slot, self.model_config, self.device = composite, slot, model_config, device
        self.registered: dict[str, Any] = composite.later.compilation_config.static_forward_context
        before = set(self.registered)
        try:
            with set_default_torch_dtype(model_config.dtype), device:
                self.tower: Any = composite.later_tower()
        finally:
            self.own = set(self.registered) - before
        share_attention([composite.towers[0], self.tower], self.registered)
        if composite.stacked is not None:
            composite.stacked.adopt(slot, self.tower)
        self.work = itertools.chain(self._copy(path), self._finish())

    def load(self, budget: int) -> bool:
        """Do the work for about `budget` bytes of weights; returns whether that was the last. Raises ValueError if a weight is missing."""
        done = 0
        with set_default_torch_dtype(self.model_config.dtype):
            for size in self.work:
                done += size
                if done >= budget:
                    return False
        return True

    def install(self) -> None:
        """Put the complete tower into its slot."""
        self.composite.replace_tower(self.slot, self.tower.eval())

    def discard(self) -> None:
        """Leave everything as it was before."""
        for name in self.own:
            self.registered.pop(name, None)

    def _copy(self, path: Path) -> Iterator[int]:
        """Copy the weights from their files; yields the bytes of each."""
        wanted, loaded = {name for name, _ in self.tower.named_parameters()}, set[str]()
        for name, tensor in safetensors_weights_iterator([str(f) for f in sorted(path.glob("*.safetensors"))], use_tqdm_on_load=False):
            names = self.tower.load_weights(iter([(name, tensor)]))
            loaded |= wanted if names is None else names  # None: a model that doesn't say
            yield tensor.nbytes
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
