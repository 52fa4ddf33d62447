"""/v1/completions and /v1/chat/completions: choose the domain, then let vLLM answer."""

from contextvars import ContextVar
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server import metrics
from server.engine.choice import DOMAIN, LAMBDA, MemoryChoice
from server.engine.openai_layer import (
    ChatCompletionRequest,
    CompletionRequest,
    create_chat_completion,
    create_completion,
    validate_json_request,
)
from server.errors import MemdecError, RequestError
from server.routing.selection import Selection, select

router = APIRouter(dependencies=[Depends(validate_json_request)])
asked_model: ContextVar[str | None] = ContextVar("asked_model", default=None)


@router.post("/v1/completions")
async def completions(request: CompletionRequest, raw_request: Request) -> Response:
    """OpenAI's completions, with `domain`, `lambda` and `memory` as further fields or headers."""
    return await _answer(create_completion, request, raw_request)


@router.post("/v1/chat/completions")
async def chat_completions(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """OpenAI's chat completions, with the same further fields."""
    return await _answer(create_chat_completion, request, raw_request)


async def _answer(handler: Any, request: Any, raw_request: Request) -> Response:
    """Everything is validated before vLLM's handler runs: later an error would be HTTP 200 and an event in the stream."""
    mode, domain, status = metrics.NONE, metrics.NONE, 500
    try:
        selection = _select(request, raw_request)
        mode, domain = selection.mode, selection.domain.name if selection.domain is not None else metrics.NONE
        _apply(selection, request)
        asked_model.set(request.model)
        response: Response = await handler(request, raw_request)
        if response is None:  # the client went away
            status = 499
            return Response(status_code=status)
        response.headers.update(selection.headers())
        status = response.status_code
        return response
    except MemdecError as error:
        status = error.status
        raise
    finally:
        metrics.REQUESTS.labels(mode, domain, str(status)).inc()


def _select(request: Any, raw_request: Request) -> Selection:
    """The selection of one parsed request. Our fields are unknown to vLLM's classes, which keep such fields in `model_extra`."""
    for name in (DOMAIN, LAMBDA):
        if name in (request.vllm_xargs or {}):
            raise RequestError(f"vllm_xargs.{name} is reserved. Use the body field {name}.", "vllm_xargs")
    headers = {name: raw_request.headers.getlist(name) for name in ("x-domain", "x-lambda", "x-memory")}
    return select(raw_request.app.state.domains, request.model, headers, request.model_extra or {})


def _apply(selection: Selection, request: Any) -> None:
    """Put an active selection where it travels to the worker: SamplingParams.extra_args, by way of vllm_xargs."""
    if not selection.active or selection.domain is None:
        return
    if request.use_beam_search:
        raise RequestError("Beam search can't be used with a domain. Drop use_beam_search, or the domain.", "use_beam_search")
    request.vllm_xargs = {**(request.vllm_xargs or {}), **MemoryChoice(selection.domain.name, selection.lam).to_extra_args()}
