"""vLLM's output processor, which also measures each domain and mode: time to the first token, between tokens, and per token."""

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.metrics.stats import IterationStats

from memdec.server.choice import BESIDE, SEGMENT, SLOT, MemoryChoice
from memdec.server.engine import tracing
from memdec.server.engine.grammars import FIELD
from memdec.server.metrics import NO_LABEL, Timings

CANNOT_BE_FOLLOWED = "The schema, grammar, choice or regular expression of this request can't be followed."


class TimedOutputProcessor(OutputProcessor):
    """Sees every token of every request, streamed or not, with the engine core's own timestamps."""

    timings: Timings

    def add_request(self, request: EngineCoreRequest, *args: object, **kwargs: object) -> None:
        """Note the request's metric label, slots and pass."""
        super().add_request(request, *args, **kwargs)
        choice = MemoryChoice.of(request.sampling_params)
        state: RequestState = self.request_states[request.request_id]
        state.memory_label = choice.label if choice is not None else NO_LABEL
        extra = getattr(request.sampling_params, "extra_args", None) or {}
        state.memory_segment = extra.get(SEGMENT, 0)
        state.memory_slots = (extra.get(SLOT, 0), extra.get(BESIDE, 0))

    def process_outputs(self, engine_core_outputs: list[EngineCoreOutput], *args: object, **kwargs: object) -> OutputProcessorOutput:
        """End an answer whose grammar allowed no token with a client error; vLLM reports it like any failure of its own.

        The one failure that the scheduler reports with tokens is a grammar that doesn't take what was sampled under its own mask.
        """
        ended = [o for o in engine_core_outputs if o.finish_reason == FinishReason.ERROR and o.new_token_ids]
        stuck = [state.queue for o in ended if (state := self.request_states.get(o.request_id)) is not None]
        processed = super().process_outputs(engine_core_outputs, *args, **kwargs)
        for queue in filter(None, stuck):
            queue.put(VLLMValidationError(CANNOT_BE_FOLLOWED, parameter=FIELD))
        return processed

    def _update_stats_from_output(
        self,
        req_state: RequestState,
        engine_core_output: EngineCoreOutput,
        engine_core_timestamp: float,
        iteration_stats: IterationStats | None,
    ) -> None:
        first, before = req_state.is_prefilling, req_state.stats.last_token_ts if req_state.stats else 0.0
        super()._update_stats_from_output(req_state, engine_core_output, engine_core_timestamp, iteration_stats)
        if iteration_stats is None or not engine_core_output.new_token_ids:
            return
        # A later pass of one answer begins when the pass before it ends: its first token is the client's next.
        seconds = req_state.stats.first_token_latency if first else engine_core_timestamp - before
        first = first and req_state.memory_segment < 2
        self.timings.tokens(req_state.memory_label, len(engine_core_output.new_token_ids), seconds, first)

    def _update_stats_from_finished(
        self, req_state: RequestState, finish_reason: FinishReason, iteration_stats: IterationStats | None
    ) -> None:
        super()._update_stats_from_finished(req_state, finish_reason, iteration_stats)
        if iteration_stats is not None and req_state.stats.num_generation_tokens > 1 and not req_state.memory_segment:
            self.timings.finished(req_state.memory_label, iteration_stats.finished_requests[-1].mean_time_per_output_token)

    def do_tracing(self, engine_core_output: EngineCoreOutput, req_state: RequestState, iteration_stats: IterationStats | None) -> None:
        """vLLM's span of one request, with mode and domain as attributes."""
        with tracing.attributes_of(req_state.memory_label):
            super().do_tracing(engine_core_output, req_state, iteration_stats)
