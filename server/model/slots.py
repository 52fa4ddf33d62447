"""Slots for decoders that come and go while the engine runs.

All decoders have one architecture and shape and share the first tower's attention layers, so a new one needs no place in the KV cache: its
tower is built beside those that run, filled from its files piece by piece, between steps, and put into an empty slot when it is
complete. An empty slot holds nothing. Only the first tower stays until another takes its slot: it owns the attention layers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
from vllm.utils.torch_utils import set_default_torch_dtype

from server.model.routed import share_attention
from server.routing.domains import DECODER, KNN


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
        self.registered: dict[str, Any] = composite.beside.compilation_config.static_forward_context
        self.weights = self._weights(path)
        self.loaded: set[str] | None = set()
        before = set(self.registered)
        try:
            with set_default_torch_dtype(model_config.dtype), device:
                self.tower: nn.Module = composite.build_tower()
        finally:
            self.own = set(self.registered) - before

    @staticmethod
    def _weights(path: Path) -> Iterator[tuple[str, Tensor]]:
        weights: Iterator[tuple[str, Tensor]] = safetensors_weights_iterator(
            [str(f) for f in sorted(path.glob("*.safetensors"))], use_tqdm_on_load=False
        )
        return weights

    def load(self, budget: int) -> bool:
        """Copy weights of about `budget` bytes; returns whether those were the last."""
        piece, size = [], 0
        for name, tensor in self.weights:
            piece.append((name, tensor))
            size += tensor.nbytes
            if size >= budget:
                break
        tower: Any = self.tower
        with set_default_torch_dtype(self.model_config.dtype):
            names = tower.load_weights(iter(piece)) if piece else set()
        self.loaded = None if names is None or self.loaded is None else self.loaded | names
        return size < budget

    def install(self) -> None:
        """Put the complete tower into its slot. Raises ValueError if a weight was not in its files."""
        if self.loaded is not None and (missing := sorted({n for n, _ in self.tower.named_parameters()} - self.loaded)):
            raise ValueError(f"weight {missing[0]} is not in its files")
        with set_default_torch_dtype(self.model_config.dtype):
            process_weights_after_loading(self.tower, self.model_config, self.device)
        self.tower.eval()
        share_attention([self.composite.towers[0], self.tower], self.registered)
        self.composite.replace_tower(self.slot, self.tower)

    def discard(self) -> None:
        """Leave everything as it was before."""
        for name in self.own:
            self.registered.pop(name, None)
