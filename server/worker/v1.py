"""V1 adapter: hands each step's routing to the model as a keyword argument of its forward.

vLLM documents `_model_forward` as the method to override for that. The workers build their runner by a module-level name,
which is the only seam there is.
"""

import copy
from typing import Any

import torch
from vllm.compilation.cuda_graph import CUDAGraphOptions, CUDAGraphWrapper
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker import cpu_worker, gpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from memdec.server.choice import MemoryChoice
from memdec.server.composite_spec import spec_of
from memdec.server.in_place import overwrite
from memdec.server.model.attention import attention_names
from memdec.server.model.routing import NONE_KNOWN, RowChoice, StepRouting
from memdec.server.routing.domains import DECODER, NGRAM
from memdec.server.worker import expand
from memdec.server.worker.forward_contexts import Numbers, RunnerAttention
from memdec.server.worker.seeds import RewindsSeeds, replaced
from memdec.server.worker.slots import HoldsSlots, chosen
from memdec.server.worker.text import text_of_v1


class RoutesSteps:
    """Mixin for vLLM's V1 model runners: gives the composite the routing of each step."""

    slots: dict[tuple[str, str], int]
    first_ngram: int
    """The lowest slot of n-gram memories."""
    attention: RunnerAttention
    last: tuple[tuple[list[RowChoice], int, bool], StepRouting] | None = None
    """What the last step's routing was made of, and that routing; it is reused, since decoding steps in a row mostly have the same."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)  # type: ignore[call-arg]
        if vllm_config.speculative_config is not None:
            # With speculation vLLM makes no logits processors of min_p and logit_bias, which its verifier can't apply. Here such requests draft nothing.
            plain = copy.copy(vllm_config)
            overwrite(plain, "speculative_config", None)
            runner: GPUModelRunner = self
            overwrite(runner.input_batch, "logitsprocs", build_logitsprocs(plain, device, PIN_MEMORY, False))

    def load_model(self, *args: object, **kwargs: object) -> None:
        """Also replace the CUDA graph that vLLM would make of the whole composite by one of the base and one of the memories."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        runner: GPUModelRunner = self
        if isinstance(runner.model, CUDAGraphWrapper):
            overwrite(runner, "model", runner.model.unwrap())
            runner.model.wrap(
                lambda part: CUDAGraphWrapper(part, runner.vllm_config, CUDAGraphMode.FULL, CUDAGraphOptions(weak_ref_output=False))
            )

    def initialize_kv_cache(self, *args: object, **kwargs: object) -> None:
        """Also find the towers' attention layers in the KV cache."""
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        runner: GPUModelRunner = self
        spec = spec_of(runner.model_config.hf_config)
        self.slots, self.first_ngram = spec.first_slots, spec.first_ngram
        self.attention = RunnerAttention(runner, attention_names(runner.get_model().towers))
        if runner.speculative_config is not None:
            runner.drafter.attach(runner)

    def _model_forward(self, input_ids: torch.Tensor | None = None, *args: object, **kwargs: Any) -> Any:
        runner: GPUModelRunner = self
        batch = runner.input_batch
        ends = runner.query_start_loc.np[: batch.num_reqs + 1].tolist()
        known = self._known(ends)
        rows = [self._row(runner.requests[r], ends[i + 1] - ends[i], len(known[i])) for i, r in enumerate(batch.req_ids)]
        total = len(input_ids) if input_ids is not None else len(kwargs["inputs_embeds"])
        captured = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL
        if self.last is None or self.last[0] != (rows, total, captured):
            self.last = (rows, total, captured), StepRouting.of(rows, total, runner.device, captured)
        routing = self.last[1]
        looks_up = any(row.looks_up(self.first_ngram) for row in rows)
        text = text_of_v1(runner, ends, [row.beside for row in rows]) if looks_up else None
        drafted = 0 if runner.speculative_config is None else runner.speculative_config.num_speculative_tokens
        runner.get_model().ngrams.begin(text, rows, 1 + drafted)
        more: dict[str, object] = {"routing": routing, "known": torch.cat([k for k in known if len(k)]) if len(routing.known) else None}
        decoders = len(runner.get_model().towers)
        parts = [group for group in routing.groups if group.slot <= decoders and group.tokens is not None and len(group.tokens)]
        more["attention"] = {group.slot: self.attention.of_step(group) for group in parts} if not captured else {}
        return super()._model_forward(input_ids, *args, **more, **kwargs)  # type: ignore[misc]

    def _known(self, ends: list[int]) -> list[torch.Tensor]:
        """For each request: its decoder's hidden states of those first tokens in this step that it ran while drafting, [n, H_memory]."""
        runner: GPUModelRunner = self
        batch = runner.input_batch
        if runner.speculative_config is None or not runner.drafter.seen:
            return [NONE_KNOWN] * len(batch.req_ids)
        places, ids = batch.num_computed_tokens_cpu, runner.input_ids.np
        return [runner.drafter.known(name, int(places[i]), ids[ends[i] : ends[i + 1]]) for i, name in enumerate(batch.req_ids)]

    def _calc_spec_decode_metadata(self, num_draft_tokens: Numbers, cu_num_tokens: Numbers) -> SpecDecodeMetadata:
        """vLLM's metadata of the drafts to verify; without any, the only field that is read then, the index of each request's last token."""
        runner: GPUModelRunner = self
        if num_draft_tokens.any():
            return super()._calc_spec_decode_metadata(num_draft_tokens, cu_num_tokens)  # type: ignore[misc]
        none, last = torch.zeros(0, dtype=torch.int32), torch.from_numpy(cu_num_tokens - 1).to(runner.device)
        return SpecDecodeMetadata(none, num_draft_tokens.tolist(), none, none, none, none, last)

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> SamplerOutput:
        """Sample; in a step without drafts to verify as vLLM does without speculation, which costs less."""
        if spec_decode_metadata is not None and spec_decode_metadata.max_spec_len == 0:
            spec_decode_metadata = None
        return super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        """Whether to draft. Our drafter keeps each request within the context; vLLM stops drafting for all requests when one is near its end."""
        return common_attn_metadata is not None

    def _row(self, request: CachedRequestState, tokens: int, known: int) -> RowChoice:
        """The routing of a request's tokens in this step. Its slot and lambda are read from its parameters once, and kept on it."""
        if not hasattr(request, "memory"):
            request.memory = chosen(MemoryChoice.of(request.sampling_params), self.slots)
        slot, lam, beside = request.memory
        return RowChoice(slot, lam, tokens, known, beside)


class RoutedCPUModelRunner(RoutesSteps, RewindsSeeds, CPUModelRunner):
    """vLLM's V1 CPU runner with routing."""


class RoutedGPUModelRunner(RoutesSteps, GPUModelRunner):
    """vLLM's V1 CUDA runner with routing."""


class TellsTimes:
    """Mixin for workers: counters that the front end reads when Prometheus scrapes it."""

    def step_times(self) -> dict[str, tuple[float, int]]:
        """Part of a step -> seconds and calls since the start."""
        worker: WorkerBase = self
        times: dict[str, tuple[float, int]] = worker.model_runner.get_model().times.totals()
        return times

    def draft_counts(self) -> dict[str, tuple[int, int]]:
        """Drafter -> tokens drafted and tokens accepted since the start."""
        runner: GPUModelRunner = self.model_runner  # type: ignore[attr-defined]
        none = dict.fromkeys((DECODER, NGRAM), (0, 0))
        return none | (runner.drafter.lengths.counts if runner.speculative_config is not None else {})


class CPUMemoryWorker(HoldsSlots, TellsTimes, cpu_worker.CPUWorker):
    """`worker_cls` on CPUs."""

    def init_device(self) -> None:
        """Build the routed runner where vLLM would build its own."""
        if self.vllm_config.speculative_config is not None:
            expand.install()
        with replaced(cpu_worker, "CPUModelRunner", RoutedCPUModelRunner):
            super().init_device()


class GPUMemoryWorker(HoldsSlots, TellsTimes, gpu_worker.Worker):
    """`worker_cls` on CUDA devices."""

    def _make_model_runner(self) -> RoutedGPUModelRunner:
        return RoutedGPUModelRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        """Bytes that vLLM finds for the KV cache, less those of decoders that may be loaded into empty slots."""
        available: int = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:  # set on the command line
            return available
        reserved: int = self.model_runner.get_model().reserved_bytes()
        return available - reserved
