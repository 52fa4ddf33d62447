"""vLLM's AsyncLLM with prefix-cache salts by domain, admission, draining, RAG, grammar checks, and TTFT and inter-token latency by domain."""

import copy
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, cast

from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.inputs import EngineInput
from vllm.outputs import RequestOutput
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from memdec.server.choice import BESIDE, CLIENT, SCORED, SEGMENT, SLOT, MemoryChoice
from memdec.server.composite_spec import CompositeSpec
from memdec.server.engine import rag, tracing
from memdec.server.engine.admission import Admission, account, turn_of_request
from memdec.server.engine.answer_scoring import scored
from memdec.server.engine.grammars import Grammars
from memdec.server.engine.liveness import Liveness, engines_with_work
from memdec.server.engine.loaded_domains import LoadedDomains, Snapshot
from memdec.server.engine.sandbox import Sandbox
from memdec.server.engine.shadows import Shadows
from memdec.server.engine.sources import OpenMemories, collected, with_sources
from memdec.server.engine.timed_outputs import TimedOutputProcessor
from memdec.server.engine.tool_calls import bounded
from memdec.server.errors import RequestError, ShuttingDown
from memdec.server.in_place import become, overwrite, require
from memdec.server.metrics import DRAFTED, Timings
from memdec.server.model.timing import PARTS
from memdec.server.retrieval.rag import PassageFinder, added
from memdec.server.routing.domains import DECODER, NGRAM, RAG
from memdec.server.worker.shares import BACKGROUND


class CutOff(EngineDeadError):
    """Ends the requests that still run when the drain's time is up."""

    def __init__(self) -> None:
        super().__init__()
        self.args = ("The server is shutting down and cut this request off; send it to another replica.",)


class MemoryEngine(AsyncLLM):
    """The engine client of one server process."""

    loaded: LoadedDomains
    """Set by the launcher before the first request."""
    draining = False
    shadows: Shadows | None = None
    takes_priorities = True
    """Whether clients may give their requests a priority, where the scheduler knows them."""
    sandbox: Sandbox | None = None
    """Started by the launcher, before there are threads; without one, the first grammar starts its own."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.equip()

    def equip(self) -> None:
        """Add to an AsyncLLM what MemoryEngine needs: grammars, admission, liveness, and metrics of its domains."""
        require(self, "output_handler")  # shutdown, which also ends what was half made, must do without
        spec = CompositeSpec.of(self.vllm_config.model_config.hf_config)
        # Ours draft nothing for requests with min_p or logit_bias, which vLLM would refuse.
        overwrite(self.input_processor, "speculative_config", None)
        # vLLM would convert grammars in the event loop: the sandbox does, and add_request waits for it.
        overwrite(self.input_processor, "structured_outputs_config", None)
        self.grammars = Grammars(self.vllm_config, self.sandbox)
        self.has_memories = spec is not None
        self.admitting: Counter[int] = Counter()
        """Requests on their way into the engine, by slot."""
        self.finders: dict[str, PassageFinder] = {}
        """The passages of each domain that has some."""
        self.open_memories = OpenMemories()
        bound, self.scheduler_config.max_num_queued_reqs = self.scheduler_config.max_num_queued_reqs, None
        self.admission = Admission(bound)
        self.liveness = Liveness(lambda: engines_with_work(self.engine_core, self.get_num_unfinished_requests()))
        self.liveness.watch(self.engine_core)
        tracing.install()
        # The output loop holds on to this object, so it can't be replaced by another.
        become(self.output_processor, TimedOutputProcessor)
        self.output_processor.timings = Timings(spec.labels if spec is not None else ())

    def generate(
        self, prompt: EngineInput, sampling_params: SamplingParams, request_id: str, **rest: object
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request, as AsyncLLM gives them; in mode `rag` with a passage before the prompt. Prompts come in their order in the HTTP request."""
        if (sampling_params.extra_args or {}).get(SCORED):
            return scored(self._generate, self.model_config, prompt, sampling_params, request_id, **rest)
        return self._generate(prompt, sampling_params, request_id, **rest)

    def _generate(
        self, prompt: EngineInput, sampling_params: SamplingParams, request_id: str, **rest: object
    ) -> AsyncGenerator[RequestOutput, None]:
        choice, plain = MemoryChoice.of(sampling_params), cast(rag.Generate, super().generate)
        replayed = (getattr(sampling_params, "extra_args", None) or {}).get(CLIENT) == BACKGROUND
        if rest.get("priority") and not self.takes_priorities and not replayed:
            raise VLLMValidationError("priority: this server's scheduling policy knows none; leave it out", parameter="priority")
        if choice is None or choice.mode != RAG:
            if self.shadows is not None and choice is not None and choice.decoded:
                self.shadows.offer(prompt, sampling_params, choice)
            if choice is not None and choice.sources:
                return self._with_sources(choice, prompt, sampling_params, request_id, **rest)
            return plain(prompt, sampling_params, request_id, **rest)
        finder, context, count = self.finders[choice.domain], self.model_config.max_model_len, added.get().of_next_prompt()
        if choice.stride:
            rest["tokenizer"] = self.renderer.tokenizer
            return rag.retrieve_every(choice.stride, plain, finder, context, count, prompt, sampling_params, request_id, **rest)
        return rag.retrieve_once(plain, finder, context, count, prompt, sampling_params, request_id, **rest)

    def _with_sources(
        self, choice: MemoryChoice, prompt: EngineInput, params: SamplingParams, request_id: str, **rest: object
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request, whose sources are collected for the HTTP request."""
        domain = self.loaded.current.domains.get(choice.domain)
        ngrams = domain.ngrams if domain is not None else None
        opened, mode = self.open_memories.get(ngrams), self.model_config.logprobs_mode
        return with_sources(super().generate, opened, collected.get().of_next_prompt(), mode, prompt, params, request_id, **rest)

    async def step_times(self) -> dict[str, tuple[float, int]]:
        """Part of a step -> seconds and calls since the start; empty without memories. Brings the metrics of drafts up to date, too."""
        if not self.has_memories:
            return {}
        # The ranks of one replica take their steps together; replicas take their own.
        drafts = [ranks[0] for ranks in await self.everywhere("draft_counts")]
        DRAFTED.totals = {name: (sum(d[name][0] for d in drafts), sum(d[name][1] for d in drafts)) for name in (DECODER, NGRAM)}
        replicas = [ranks[0] for ranks in await self.everywhere("step_times")]
        return {part: (sum(r[part][0] for r in replicas), sum(r[part][1] for r in replicas)) for part in PARTS}

    async def everywhere(self, method: str, *args: object) -> list[list[Any]]:
        """Call a method on every worker, between two steps: for each replica, each rank's answer."""
        answers: list[list[Any]] = await self.engine_core.call_utility_all_async("collective_rpc", method, None, args, None)
        return answers

    def uses(self, slot: int) -> bool:
        """Whether an unfinished request uses this slot."""
        running = (getattr(state, "memory_slots", ()) for state in self.output_processor.request_states.values())
        return self.admitting[slot] > 0 or any(slot in slots for slots in running)

    async def add_request(
        self,
        request_id: str,
        prompt: EngineInput | EngineCoreRequest,
        params: SamplingParams | PoolingParams,
        *args: object,
        **kwargs: object,
    ) -> RequestOutputCollector:
        """The one choke point of all routes: prefix-cache blocks carry the domain and decoder revision that filled them.

        The request is given the slots of its memories' revisions, and stays there when the domain gets a newer one.
        A client's own salt is namespaced, or it could name another domain's blocks. Lambda changes no KV, so requests that
        differ in it alone share blocks.
        """
        params = await self._compilable(
            bounded(params)
        )  # the only await before the engine has the request: domains may change meanwhile, so it comes first
        choice, current = MemoryChoice.of(params), self.loaded.current
        if choice is not None and choice.domain not in current.revisions:
            # The routes have checked it: it was unloaded since.
            valid = ", ".join(current.domains.names)
            raise VLLMNotFoundError(f"The domain {choice.domain!r} does not exist any more. Valid domains: {valid}.")
        salt = cache_salt(choice, current.revisions, prompt.get("cache_salt") if isinstance(prompt, dict) else prompt.cache_salt)
        if salt is not None:
            if isinstance(prompt, dict):
                prompt["cache_salt"] = salt
            else:
                prompt.cache_salt = salt
        slots = self._slots_of(choice, current)
        params = _with_engine_fields(params, slots)
        self.admitting.update(slots)
        try:
            _charge(prompt, params)
            added = await super().add_request(request_id, prompt, params, *args, **kwargs)
            self.liveness.given()
            return added
        except (ShuttingDown, RequestError) as error:  # vLLM passes on its own kinds of errors alone
            raise GracefulHTTPError(str(error), HTTPStatus(error.status)) from None
        finally:
            self.admitting.subtract(slots)
            self.admission.arrived(getattr(params, "n", 1))

    @staticmethod
    def _slots_of(choice: MemoryChoice | None, current: Snapshot) -> tuple[int, ...]:
        """The slots that a request gets; (): the worker looks its memory up, or it needs none. Raises VLLMNotFoundError if a memory was unloaded since."""
        if choice is None or not choice.mixed:
            return ()
        slots = current.slots_of(choice.mode, choice.domain)
        if not all(slots):
            raise VLLMNotFoundError(f"The domain {choice.domain!r} has no memory {choice.mode!r} any more.")
        return slots

    async def _compilable(self, params: SamplingParams | PoolingParams) -> SamplingParams | PoolingParams:
        """A copy of the parameters whose grammar the sandbox has compiled. Raises VLLMValidationError."""
        constraint = getattr(params, "structured_outputs", None)
        if constraint is None or constraint.all_constraints_none():
            return params
        params = copy.copy(params)
        params.structured_outputs = await self.grammars.checked(constraint)
        return params

    @contextmanager
    def admit(self, choices: int) -> Iterator[None]:
        """Keep room for an HTTP request's choices until the engine has them. Raises QueueFull, and what check_admission raises."""
        self.check_admission(choices)
        with self.admission.keep(choices, self.get_num_unfinished_requests()):
            yield

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
        """Raise ShuttingDown while draining, and vLLM's own error where the queue's tokens are bounded (--max-num-queued-tokens)."""
        if self.draining:
            raise ShuttingDown("The server is shutting down; send the request to another replica.")
        super().check_admission(n, request_id)

    async def check_health(self) -> None:
        """Raise EngineDeadError, which /health answers with 503, while draining, while the engine hangs and after its death."""
        if self.draining or self.liveness.hung:
            raise EngineDeadError()
        await super().check_health()


def _with_engine_fields(params: SamplingParams | PoolingParams, slots: tuple[int, ...]) -> SamplingParams | PoolingParams:
    """A copy of the parameters with the memories' slots, for the worker, and the client of the fair share, for the scheduler."""
    extra: dict[str, int | str] = dict(zip((SLOT, BESIDE), slots, strict=False))
    if client := turn_of_request():
        extra[CLIENT] = client
    if not extra or not hasattr(params, "extra_args"):
        return params
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), **extra}
    return params


def _charge(prompt: EngineInput | EngineCoreRequest, params: SamplingParams | PoolingParams) -> None:
    """Count a request's tokens for its API key. Raises RequestError if they are too many."""
    mine, ids = account.get(), prompt.get("prompt_token_ids") if isinstance(prompt, dict) else prompt.prompt_token_ids
    extra = getattr(params, "extra_args", None) or {}
    if mine is not None and extra.get(SEGMENT, 0) < 2:  # later passes of one answer are parts of what was counted
        mine.spend(len(ids or ()) + getattr(params, "n", 1) * (getattr(params, "max_tokens", None) or 0))


def cache_salt(choice: MemoryChoice | None, revisions: Mapping[str, str], client: str | None) -> str | None:
    """The salt of a request's first cache block; None, vLLM's default, for the base without a salt of the client's.

    Only decoders have KV of their own: kNN-LM, RAG and n-grams fill the base's blocks.
    """
    if choice is None or not choice.decoded:
        return f"base:{client}" if client else None
    return f"domain:{choice.domain}:{revisions[choice.domain]}:{client or ''}"
