"""A CUDA graph's stand-in on the CPU: the operations of a function's first call at a shape, run again with later calls' tensors and no Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

ASKS_THE_DEVICE = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "is_nonzero")


class Traced:
    """Called like what it stands for."""

    def __init__(self, part: Callable[..., Any]) -> None:
        self.part = part
        self.graphs: dict[tuple[Any, ...], Any] = {}
        self.replays = 0

    def __call__(self, *args: Any) -> Any:
        """Trace at the first call with these shapes, replay at any other."""
        shapes = tuple(x.shape if isinstance(x, torch.Tensor) else x for x in args)
        if shapes in self.graphs:
            self.replays += 1
            return self.graphs[shapes](*args)
        with torch.no_grad():
            graph = make_fx(self.part)(*args)
        called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        asked = [name for name in called if any(word in name for word in ASKS_THE_DEVICE)]
        assert not asked, f"a graph can't hold {asked}"
        self.graphs[shapes] = graph
        return graph(*args)
