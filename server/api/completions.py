"""/v1/completions and /v1/chat/completions, and what all routes that answer share: choose the domain, then let vLLM answer."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from memdec.server.api.body import ChatCompletion, Completion, ResponseRequest, require_sound
from memdec.server.api.catalogue import offered, require_model
from memdec.server.api.fields import pin_forced_calls, require_effective, require_shown_tools
from memdec.server.api.limits import Limits
from memdec.server.api.openapi import with_memory
from memdec.server.api.sources import with_sources
from memdec.server.choice import RESERVED, MemoryChoice
from memdec.server.engine.openai_layer import (
    ChatCompletionResponse,
    CompletionResponse,
    VLLMServerError,
    create_chat_completion,
    create_completion,
    validate_json_request,
    with_cancellation,
)
from memdec.server.engine.sources import Collected, collected
from memdec.server.errors import RequestError
from memdec.server.json_types import JsonObject
from memdec.server.logs import MEMDEC
from memdec.server.retrieval.rag import Added, added
from memdec.server.routing.domains import NONE, RAG
from memdec.server.routing.selection import SHARE, SOURCES, STRIDE, Selection, select

router = APIRouter(dependencies=[Depends(validate_json_request), Depends(require_sound)])
asked_model: ContextVar[str | None] = ContextVar("asked_model", default=None)
FAILED = 500
CLIENT_LEFT = 499  # recorded in the metrics alone
BEFORE_ENGINE = (
    "event: response.created",
    "event: response.in_progress",
)  # events of /v1/responses that vLLM sends before it asks the engine
LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
Parsed = Completion | ChatCompletion | ResponseRequest
Asked = TypeVar("Asked", Completion, ChatCompletion, ResponseRequest)
Event = str | bytes | memoryview
"""What Starlette takes from a body's iterator; vLLM's events are str."""


@router.post("/v1/completions", **with_memory(CompletionResponse))
async def completions(request: Completion, raw_request: Request) -> Response:
    """OpenAI's completions, with `domain`, `lambda` and `memory` as further fields or headers."""
    return await answer(create_completion, request, raw_request)


@router.post("/v1/chat/completions", **with_memory(ChatCompletionResponse))
async def chat_completions(request: ChatCompletion, raw_request: Request) -> Response:
    """OpenAI's chat completions, with the same further fields."""
    return await answer(create_chat_completion, request, raw_request)


async def answer(handler: Callable[[Asked, Request], Awaitable[Response]], request: Asked, raw_request: Request) -> Response:
    """Answer a request. Everything is validated before the answer starts: after that, an error could only be an event in a stream with HTTP 200."""
    state = raw_request.app.state
    require_effective(request, state.limits.strict_fields)
    require_shown_tools(request, getattr(state.args, "tools_shown", True))
    pin_forced_calls(request)
    choices = _choices(request, raw_request)
    selection = _select(request, raw_request)
    raw_request.state.selection = selection  # for the metrics and the log
    _apply(selection, request)
    asked_model.set(request.model)
    retrieved = Added()
    added.set(retrieved)
    sources = Collected()
    collected.set(sources)
    response: Response | None
    engine = state.engine_client
    with engine.admit(choices):
        with _failures_logged(raw_request):
            response = await handler(request, raw_request)
        if isinstance(response, StreamingResponse):
            response = await with_cancellation(_begin)(response, raw_request)
    if response is None:
        return Response(status_code=CLIENT_LEFT)
    if response.status_code >= FAILED:
        _log_failure(raw_request, f"HTTP {response.status_code}")
    if selection.mode == RAG:
        response = with_usage(response, retrieved, _field(request, "n") or 1)
    if selection.sources:
        response = with_sources(response, sources, _field(request, "n") or 1)
    response.headers.update(selection.headers())
    return response


def with_usage(response: Response, retrieved: Added, n: int) -> Response:
    """Add the tokens of retrieved passages to an answer's usage: vLLM counts those of the client's prompt alone.

    An event with a choice has the usage of that choice alone; `n` choices share each prompt.
    """
    if isinstance(response, StreamingResponse):
        events = response.body_iterator

        async def counted() -> AsyncIterator[Event]:
            async for event in events:
                if isinstance(event, str) and event.startswith("data: {") and '"usage":{' in event:
                    body = json.loads(event[6:])
                    tokens = retrieved.counts[body["choices"][0]["index"] // n].tokens if body.get("choices") else retrieved.tokens
                    event = f"data: {json.dumps(_counted(body, tokens), ensure_ascii=False)}\n\n"
                yield event

        response.body_iterator = counted()
        return response
    body = json.loads(bytes(response.body))
    return (
        JSONResponse(_counted(body, retrieved.tokens), response.status_code) if "prompt_tokens" in (body.get("usage") or ()) else response
    )


def _counted(body: JsonObject, tokens: int) -> JsonObject:
    for key in ("prompt_tokens", "total_tokens"):
        body["usage"][key] += tokens
    return body


async def _begin(response: StreamingResponse, _: Request) -> Response:
    """Wait for a stream's first event. The engine's own checks come only now: an error in its place is an HTTP error after all."""
    events, before = aiter(response.body_iterator), []
    while (first := await anext(events, "")) and str(first).startswith(BEFORE_ENGINE):
        before.append(first)
    if isinstance(first, str) and first.startswith('data: {"error"'):
        error = json.loads(first.removeprefix("data: "))
        return JSONResponse(error, status_code=error["error"]["code"])

    async def all_events() -> AsyncIterator[Event]:
        for event in (*before, first):
            yield event
        async for event in events:
            yield event

    response.body_iterator = all_events()
    return response


def _choices(request: Parsed, raw_request: Request) -> int:
    """How many answers a request asks for. Raises RequestError if that, or their length, is over the server's limits."""
    limits: Limits = raw_request.app.state.limits
    if limits.log_prompts:
        asked = next(filter(None, (_field(request, name) for name in ("prompt", "messages", "input"))), None)
        raw_request.state.prompt = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False, default=str)
    prompts = len(request.prompt) if _is_batch(_field(request, "prompt")) else 1
    n = _field(request, "n") or 1
    if prompts * n > limits.max_choices:
        of = f" for each of {prompts} prompts" if prompts > 1 else ""
        raise RequestError(
            f"This request asks for {str(n)[:20]} choices{of}; this server gives at most {limits.max_choices}.", "n" if n > 1 else "prompt"
        )
    for name in LENGTHS:
        length, most = _field(request, name), limits.max_output_tokens
        if most is not None and length is not None and length > most:
            raise RequestError(f"{name} is {str(length)[:20]}; this server gives at most {most:,}.", name)
    return int(prompts * n)


def _field(request: Parsed, name: str) -> Any:
    """A field of a request; None if its class declares none of that name, even if the client has sent one."""
    return getattr(request, name) if name in type(request).model_fields else None


@contextmanager
def _failures_logged(raw_request: Request) -> Iterator[None]:
    """Within, log a failure of the server itself with the request's id: vLLM answers 500, and logs few of them."""
    try:
        yield
    except VLLMServerError as error:
        _log_failure(raw_request, f"{type(error).__name__}: {error}")
        raise


def _log_failure(raw_request: Request, what: str) -> None:
    metadata = getattr(raw_request.state, "request_metadata", None)
    MEMDEC.error("request %s failed: %s", getattr(metadata, "request_id", None), what)


def _is_batch(prompt: object) -> bool:
    """Whether a completion's prompt is a list of prompts, not one text or one list of token ids."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


def _select(request: Parsed, raw_request: Request) -> Selection:
    """The selection of one parsed request. Our fields are unknown to vLLM's classes, which keep such fields in `model_extra`."""
    for name in RESERVED:
        if name in (request.vllm_xargs or {}):
            raise RequestError(
                f"vllm_xargs.{name} is reserved. Body fields choose a memory: domain, lambda, memory, {STRIDE}, {SHARE}.", "vllm_xargs"
            )
    headers = {name: [value.strip() for value in raw_request.headers.getlist(name)] for name in ("x-domain", "x-lambda", "x-memory")}
    domains = offered(raw_request)
    if request.model is not None:
        require_model(request.model, domains)
    return select(domains, request.model, headers, request.model_extra or {})


def _apply(selection: Selection, request: Parsed) -> None:
    """Put the selection where it travels to the engine: SamplingParams.extra_args, by way of vllm_xargs."""
    if selection.domain is None:
        return
    if selection.mode != NONE and _field(request, "use_beam_search"):
        raise RequestError("Beam search can't be used with a domain. Drop use_beam_search, or the domain.", "use_beam_search")
    open_ended = all(_field(request, name) is None for name in LENGTHS)
    if selection.sources and "input" in type(request).model_fields:
        raise RequestError(f"{SOURCES} is a field of completions and chats, not of responses. Leave it out.", SOURCES)
    choice = MemoryChoice(
        selection.mode,
        selection.domain.name,
        selection.lam,
        selection.stride,
        open_ended,
        sources=selection.sources,
        shares=selection.shares,
    )
    request.vllm_xargs = {**(request.vllm_xargs or {}), **choice.to_extra_args()}
