"""Attention metadata for some of the requests of vLLM's V1 runner: what a memory tower needs to run over them alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import ForwardContext, create_forward_context, get_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from server.model.routing import Group


class MemoryAttention:
    """Builds forward contexts in which the towers' attention layers see the chosen tokens and no others."""

    def __init__(self, runner: Any, layer_names: list[str]) -> None:
        """`runner` is a V1 runner whose KV cache is set up; `layer_names` are the towers' shared attention layers."""
        self.runner = runner
        names = set(layer_names)
        self.parts = [
            (number, group, [name for name in group.layer_names if name in names])
            for number, groups in enumerate(runner.attn_groups)
            for group in groups
            if names & set(group.layer_names)
        ]
        """KV-cache group, what builds its metadata, and the towers' layers in it."""

    def of_step(self, group: Group) -> ForwardContext:
        """For one group of the step that is being run: each of its requests' last tokens."""
        runner, requests, tokens = self.runner, group.requests, group.tokens
        mappings: Any = get_forward_context().slot_mapping
        slots = {number: mappings[names[0]].index_select(0, tokens) for number, _, names in self.parts}
        seen = runner.optimistic_seq_lens_cpu[requests]
        return self._of(requests, group.lengths, seen, runner.seq_lens.index_select(0, requests.to(runner.device)), slots)

    def of_next_tokens(self, requests: Tensor, positions: Tensor) -> ForwardContext:
        """For one further token of each request, at positions [requests] int64 on the CPU, which is the last one it sees."""
        runner = self.runner
        slots = {}
        for number in {number for number, _, _ in self.parts}:
            table = runner.input_batch.block_table[number]
            blocks = table.get_cpu_tensor()[requests, positions // table.block_size]
            slots[number] = torch.add(positions % table.block_size, blocks, alpha=table.block_size).to(runner.device)
        seen = (positions + 1).int()
        return self._of(requests, np.ones(len(requests), np.int32), seen, seen.to(runner.device), slots)

    def _of(
        self, requests: Tensor, lengths: np.ndarray[Any, Any], seen: Tensor, seq_lens: Tensor, slots: Mapping[int, Tensor]
    ) -> ForwardContext:
        """A context for requests (positions in the runner's batch, int64) that have `lengths` tokens each.

        `seen` (CPU) and `seq_lens` (device) are the tokens that each request's last one attends to, itself included, int32; `slots`
        maps KV-cache groups to the places of the new tokens' keys and values, int64.
        """
        runner = self.runner
        ends = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=ends[1:])
        starts = torch.from_numpy(ends)
        at = requests.to(runner.device)
        metadata: dict[str, Any] = {}
        mapping: dict[str, Tensor] = {}
        for number, builder, names in self.parts:
            table = runner.input_batch.block_table[number].get_device_tensor(runner.input_batch.num_reqs)
            common = CommonAttentionMetadata(
                query_start_loc=starts.to(runner.device), query_start_loc_cpu=starts, seq_lens=seq_lens, num_reqs=len(requests),
                num_actual_tokens=int(ends[-1]), max_query_len=int(lengths.max()), max_seq_len=int(seen.max()),
                block_table_tensor=table.index_select(0, at), slot_mapping=slots[number], seq_lens_cpu_upper_bound=seen,
            )  # fmt: skip
            built = builder.build_metadata(common)
            metadata |= dict.fromkeys(names, built)
            mapping |= dict.fromkeys(names, slots[number])
        return create_forward_context(metadata, runner.vllm_config, slot_mapping=mapping)
