"""One memory tower for many decoders: attention is shared, every layer with weights is routed token by token.

All decoders have one architecture and shape, so vLLM builds one tower for each; but attention layers hold no weights, only
their place in the KV cache. So every tower uses the first one's attention layers, and KV memory is that of one decoder
however many there are. A step in which one decoder is active calls that decoder's own tower. A step with several calls a
view of the tower in which each layer with weights applies each decoder's weights to that decoder's tokens.
"""

import copy
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from server.model.routing import StepRouting


class RoutedLayer(nn.Module):
    """The same layer of every decoder; each token goes through its own decoder's copy."""

    def __init__(self, copies: list[nn.Module], step: "CurrentStep") -> None:
        super().__init__()
        self.__dict__["copies"] = copies  # not registered: the towers own them
        self.__dict__["step"] = step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply each decoder's copy to its tokens; tokens of no decoder get zeros.

        Tensor arguments whose first dimension is the step's number of tokens are split; others go to every copy whole.
        """
        routing: StepRouting = self.__dict__["step"].routing
        total = len(routing.slots)
        joined: list[Any] = []
        single = True
        for slot, rows in routing.groups:
            part = self.__dict__["copies"][slot - 1](
                *[_rows(a, rows, total) for a in args], **{k: _rows(a, rows, total) for k, a in kwargs.items()}
            )
            single = not isinstance(part, tuple)
            outputs = (part,) if single else part
            if not joined:
                joined = [o.new_zeros((total, *o.shape[1:])) if isinstance(o, Tensor) else o for o in outputs]
            for whole, output in zip(joined, outputs, strict=True):
                if isinstance(output, Tensor):
                    whole.index_copy_(0, rows, output)
        return joined[0] if single else tuple(joined)


class CurrentStep:
    """Where the routed layers of one model find the step they are in."""

    routing: StepRouting


def _rows(argument: Any, rows: Tensor, total: int) -> Any:
    if isinstance(argument, Tensor) and argument.dim() and argument.shape[0] == total:
        return argument.index_select(0, rows)
    return argument


def share_attention(towers: list[nn.Module], registered: dict[str, Any]) -> None:
    """Make every tower use the first one's attention layers, and take the others' off vLLM's register of KV-cache owners."""
    shared = {name: m for name, m in towers[0].named_modules() if isinstance(m, AttentionLayerBase)}
    for tower in towers[1:]:
        for name, layer in shared.items():
            parent, _, child = name.rpartition(".")
            own: Any = tower.get_submodule(name)
            registered.pop(own.layer_name)
            setattr(tower.get_submodule(parent), child, layer)


def routed_view(towers: list[nn.Module], step: CurrentStep) -> nn.Module:
    """A module with the first tower's structure whose layers with weights are RoutedLayers over all towers."""
    first = towers[0]
    if any(True for _ in first.parameters(recurse=False)) and not isinstance(first, AttentionLayerBase):
        return RoutedLayer(towers, step)
    view = copy.copy(first)
    view._modules = {
        name: child if child is None or isinstance(child, AttentionLayerBase) else routed_view([t._modules[name] for t in towers], step)  # type: ignore[misc]
        for name, child in first._modules.items()
    }
    return view
