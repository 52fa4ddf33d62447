"""V2 adapter: hands each step's routing to the model by way of vLLM's ModelState, whose `prepare_inputs` gives keywords of `forward`."""

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from memdec.server.choice import MemoryChoice
from memdec.server.composite_spec import spec_of
from memdec.server.model.attention import attention_names
from memdec.server.model.composite import MemoryDecoderForCausalLM
from memdec.server.model.routing import BASE_ALONE, NO_DOMAIN, NOTHING, Chosen, RowChoice, StepRouting
from memdec.server.worker.forward_contexts import MemoryAttention
from memdec.server.worker.slots import chosen
from memdec.server.worker.text import text_of_v2


class MemoryModelState(DefaultModelState):
    """What vLLM's V2 runner keeps for the composite: each request's slot and lambda, and the routing of the step."""

    attention: MemoryAttention | None = None

    def __init__(
        self, vllm_config: VllmConfig, model: MemoryDecoderForCausalLM, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        spec = spec_of(vllm_config.model_config.hf_config)
        self.slots, self.first_ngram = spec.first_slots, spec.first_ngram
        self.towers = len(model.towers)
        self.names = attention_names(model.towers)
        self.rows: list[RowChoice] = []
        """What the step's requests mix in; empty: none of them has an n-gram memory."""
        self.chosen: dict[str, Chosen] = {}
        """By request."""
        self.step: dict[str, object] = {}
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.captures = model.stacked is not None or not len(model.towers)
        self.token_slots = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.token_lams = torch.zeros(tokens, device=device)
        """Slot and lambda of each token, where CUDA graphs read them."""

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Read what a new request chose."""
        super().add_request(req_index, new_req_data)
        self.chosen[new_req_data.req_id] = chosen(MemoryChoice.of(new_req_data.sampling_params), self.slots)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that has ended."""
        super().remove_request(req_id)
        self.chosen.pop(req_id, None)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        *args: object,
        **kwargs: object,
    ) -> dict[str, object]:
        """vLLM's attention metadata. Also makes the step's routing, and a forward context for each decoder that runs a part of the tokens."""
        metadata: dict[str, object] = super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs
        )
        if self.attention is None:
            self.attention = MemoryAttention(self.vllm_config, attn_groups, self.names, self.device)
        starts = input_batch.query_start_loc_np[: input_batch.num_reqs + 1]
        lengths = np.diff(starts).tolist()
        chosen = [self.chosen.get(name, NOTHING) for name in input_batch.req_ids]
        rows = [RowChoice(own.slot, own.lam, length, beside=own.beside) for own, length in zip(chosen, lengths, strict=False)]
        total = input_batch.num_tokens_after_padding
        routing = StepRouting.of(rows, total, self.device)
        self.rows = rows if any(row.looks_up(self.first_ngram) for row in rows) else []
        if cudagraph_mode == CUDAGraphMode.FULL:
            self.token_slots[:total] = routing.slots if routing.uses_memory else NO_DOMAIN
            self.token_lams[:total] = routing.lams if routing.uses_memory else 0
            return metadata
        tables = dict(enumerate(block_tables))
        contexts = {}
        for group in routing.groups:
            if group.tokens is not None and group.slot <= self.towers:
                slots = {number: slot_mappings[number].index_select(0, group.tokens) for number in self.attention.numbers}
                seen = input_batch.seq_lens_cpu_upper_bound[group.requests]
                seq_lens = input_batch.seq_lens.index_select(0, group.requests.to(self.device))
                contexts[group.slot] = self.attention.of(tables, group.requests, group.lengths, seen, slots, seq_lens)
        self.step = {"routing": routing, "attention": contexts}
        return metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, object]:
        """Further keyword arguments of the composite's forward. Profiling, which has no attention metadata, uses the base alone."""
        step, self.step = self.step or {"routing": BASE_ALONE}, {}
        rows, self.rows = self.rows, []
        self.model.ngrams.begin(text_of_v2(input_batch, req_states, [row.beside for row in rows]) if rows else None, rows)
        return {**super().prepare_inputs(input_batch, req_states), **step}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, object]:
        """Keyword arguments with which a step is captured as one CUDA graph: it always runs base and memories, and packs rows."""
        inputs: dict[str, object] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        if self.captures:
            inputs["routing"] = StepRouting.over(self.token_slots[:num_tokens], self.token_lams[:num_tokens])
        return inputs
