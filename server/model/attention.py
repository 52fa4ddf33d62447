"""Attention layers shared by all memory towers, and so one KV cache however many decoders there are.

All decoders have one architecture and shape, and attention layers hold no weights, only their place in the KV cache. So every
tower uses the first one's. A step's tokens are split by decoder, and each tower runs over its own, as a batch of its own.
"""

from typing import Any

from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase


def share_attention(towers: list[nn.Module], registered: dict[str, object]) -> None:
    """Make every tower use the first one's attention layers, and take the others' off vLLM's register of KV-cache owners."""
    shared = {name: m for name, m in towers[0].named_modules() if isinstance(m, AttentionLayerBase)}
    for tower in towers[1:]:
        for name, layer in shared.items():
            parent, _, child = name.rpartition(".")
            own: Any = tower.get_submodule(name)
            registered.pop(own.layer_name)
            setattr(tower.get_submodule(parent), child, layer)


def attention_names(towers: nn.ModuleList) -> list[str]:
    """Names by which the towers' attention layers, which are the first one's, are known to vLLM; none without decoders."""
    layers = towers[0].modules() if len(towers) else ()
    return [layer.layer_name for layer in layers if isinstance(layer, AttentionLayerBase)]
