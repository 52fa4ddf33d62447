"""vLLM's AsyncLLM with three additions: cache salts, draining, and per-token timings by domain."""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor

from server.engine.choice import MemoryChoice
from server.errors import ShuttingDown
from server.metrics import Timings


class TimedOutputProcessor(OutputProcessor):
    """Sees every token of every request, streamed or not, with the engine core's own timestamps."""

    timings: Timings

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Remember whose tokens these will be."""
        super().add_request(request, *args, **kwargs)
        choice = MemoryChoice.of(request.sampling_params)
        self.request_states[request.request_id].memory_choice = choice

    def _update_stats_from_output(self, req_state: Any, engine_core_output: Any, engine_core_timestamp: Any, iteration_stats: Any) -> None:
        first, before = req_state.is_prefilling, req_state.stats.last_token_ts if req_state.stats else 0.0
        super()._update_stats_from_output(req_state, engine_core_output, engine_core_timestamp, iteration_stats)
        if iteration_stats is None or not engine_core_output.new_token_ids:
            return
        seconds = req_state.stats.first_token_latency if first else engine_core_timestamp - before
        self.timings.tokens(req_state.memory_choice, len(engine_core_output.new_token_ids), seconds, first)

    def _update_stats_from_finished(self, req_state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        super()._update_stats_from_finished(req_state, finish_reason, iteration_stats)
        if iteration_stats is not None and req_state.stats.num_generation_tokens > 1:
            self.timings.finished(req_state.memory_choice, iteration_stats.finished_requests[-1].mean_time_per_output_token)


class CutOff(EngineDeadError):
    """What requests still running at the end of the drain end with."""

    def __init__(self) -> None:
        super().__init__()
        self.args = ("The server is shutting down and cut this request off; send it to another replica.",)


class MemoryEngine(AsyncLLM):
    """The engine client of one server process."""

    draining = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        composite = getattr(self.vllm_config.model_config.hf_config, "memory_decoder", {"decoders": []})
        self.revisions: dict[str, str] = {d["name"]: d["revision"] for d in composite["decoders"]}
        # The output loop holds on to this object, so it can't be replaced by another.
        self.output_processor.__class__ = TimedOutputProcessor
        self.output_processor.timings = Timings(self.revisions)

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The one choke point of all routes: prefix-cache blocks carry the domain and decoder revision that filled them.

        A client's own salt is namespaced, or it could name another domain's blocks. Lambda changes no KV, so requests that
        differ in it alone share blocks.
        """
        choice = MemoryChoice.of(params)
        if choice is not None and choice.domain not in self.revisions:
            raise VLLMValidationError(f"unknown domain, valid: {', '.join(self.revisions)}", parameter="domain")
        salt = cache_salt(choice, self.revisions, prompt.get("cache_salt") if isinstance(prompt, dict) else prompt.cache_salt)
        if salt is not None:
            if isinstance(prompt, dict):
                prompt["cache_salt"] = salt
            else:
                prompt.cache_salt = salt
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse new work, let the engine drain for `timeout` seconds, then end whatever is left with an error.

        vLLM calls this from another thread at SIGTERM. Without the last step, clients of unfinished requests hang.
        """
        self.draining = True
        super().shutdown(timeout=timeout)
        handler = getattr(self, "output_handler", None)
        if handler is not None and not handler.get_loop().is_closed():
            handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, CutOff())

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Raise ShuttingDown while draining, and vLLM's own errors when the queue is full."""
        if self.draining:
            raise ShuttingDown("The server is shutting down; send the request to another replica.")
        super().check_admission(n, request_id)

    async def check_health(self) -> None:
        """Raise EngineDeadError, which /health answers with 503, while draining and after the engine's death."""
        if self.draining:
            raise EngineDeadError()
        await super().check_health()


def cache_salt(choice: MemoryChoice | None, revisions: dict[str, str], client: str | None) -> str | None:
    """The salt of a request's first cache block; None, vLLM's default, for the base without a salt of the client's."""
    if choice is None:
        return f"base:{client}" if client else None
    return f"domain:{choice.domain}:{revisions[choice.domain]}:{client or ''}"
