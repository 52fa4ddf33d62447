"""Tensor parallelism: the base is sharded over the ranks, and each rank holds complete decoders.

A decoder is small: sharding it would buy little memory for two more reductions a layer, and its heads need not divide. vLLM's layers ask for their
tensor-parallel group only when they are built; a layer built in this context sees a group of one rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.distributed import parallel_state

from memdec.server.in_place import overwrite


@contextmanager
def replicated() -> Iterator[None]:
    """Within this context, build layers unsharded on every rank."""
    sharded = parallel_state.get_tp_group()
    overwrite(parallel_state, "_TP", parallel_state.get_pp_group())  # pipelines are refused, so this is a group of one
    try:
        yield
    finally:
        overwrite(parallel_state, "_TP", sharded)
