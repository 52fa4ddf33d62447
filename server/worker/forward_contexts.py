"""Attention metadata for some of the requests of a step: what a memory tower needs to run over them alone."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, create_forward_context, get_forward_context
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from memdec.server.model.routing import Group

Numbers = npt.NDArray[np.integer]


class MemoryAttention:
    """Builds forward contexts in which the towers' attention layers see the chosen tokens and no others."""

    def __init__(
        self, vllm_config: VllmConfig, attn_groups: Sequence[Sequence[AttentionGroup]], layer_names: list[str], device: torch.device
    ) -> None:
        """`attn_groups` are vLLM's, by KV-cache group; `layer_names` are the towers' shared attention layers."""
        self.config, self.device = vllm_config, device
        names = set(layer_names)
        self.parts = [
            (number, group, [name for name in group.layer_names if name in names])
            for number, groups in enumerate(attn_groups)
            for group in groups
            if names & set(group.layer_names)
        ]
        """KV-cache group, what builds its metadata, and the towers' layers in it."""
        self.numbers = sorted({number for number, _, _ in self.parts})
        """The KV-cache groups that hold the towers' layers."""

    def of(
        self, tables: Mapping[int, Tensor], requests: Tensor, lengths: Numbers, seen: Tensor, slots: Mapping[int, Tensor],
        seq_lens: Tensor | None = None,
    ) -> ForwardContext:  # fmt: skip
        """A context for `requests` (rows of the block `tables` of each KV-cache group, int64) that have `lengths` tokens each.

        `seen` (CPU) and `seq_lens` (device; by default the same) are the tokens that each request's last one attends to, itself included,
        int32; `slots` maps KV-cache groups to the places of the new tokens' keys and values, int64.
        """
        ends = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=ends[1:])
        starts, at = torch.from_numpy(ends), requests.to(self.device)
        on_device = starts.to(self.device)
        seq_lens = seen.to(self.device) if seq_lens is None else seq_lens
        metadata: dict[str, AttentionMetadata] = {}
        mapping: dict[str, Tensor] = {}
        for number, builder, names in self.parts:
            common = CommonAttentionMetadata(
                query_start_loc=on_device, query_start_loc_cpu=starts, seq_lens=seq_lens, num_reqs=len(requests), num_actual_tokens=int(ends[-1]),
                max_query_len=int(lengths.max()), max_seq_len=int(seen.max()), block_table_tensor=tables[number].index_select(0, at),
                slot_mapping=slots[number], seq_lens_cpu_upper_bound=seen,
            )  # fmt: skip
            metadata |= dict.fromkeys(names, builder.build_metadata(common))
            mapping |= dict.fromkeys(names, slots[number])
        return create_forward_context(metadata, self.config, slot_mapping=mapping)


class RunnerAttention(MemoryAttention):
    """MemoryAttention for vLLM's V1 runner, once its KV cache is set up."""

    def __init__(self, runner: GPUModelRunner, layer_names: list[str]) -> None:
        super().__init__(runner.vllm_config, runner.attn_groups, layer_names, runner.device)
        self.runner = runner

    def of_step(self, group: Group) -> ForwardContext:
        """A context for one group of the running step: the last tokens of each of its requests. A group that is all of the step needs none."""
        mappings: dict[str, Tensor] = get_forward_context().slot_mapping
        slots = {number: mappings[names[0]].index_select(0, group.tokens) for number, _, names in self.parts}  # type: ignore[arg-type]
        seen = self.runner.optimistic_seq_lens_cpu[group.requests]
        seq_lens = self.runner.seq_lens.index_select(0, group.requests.to(self.device))
        return self.of(self._tables(), group.requests, group.lengths, seen, slots, seq_lens)

    def of_next_tokens(self, requests: Tensor, positions: Tensor) -> ForwardContext:
        """A context for one further token of each request, at `positions` [requests] int64 on the CPU; it attends to all tokens up to itself."""
        slots = {}
        for number in self.numbers:
            table = self.runner.input_batch.block_table[number]
            blocks = table.get_cpu_tensor()[requests, positions // table.block_size]
            slots[number] = torch.add(positions % table.block_size, blocks, alpha=table.block_size).to(self.device)
        return self.of(self._tables(), requests, np.ones(len(requests), np.int32), (positions + 1).int(), slots)

    def _tables(self) -> dict[int, Tensor]:
        batch = self.runner.input_batch
        return {number: batch.block_table[number].get_device_tensor(batch.num_reqs) for number in self.numbers}
