"""/v1/responses: vLLM's Responses API, with a memory as for chats; what is stored is seen by the API key that asked for it alone."""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from memdec.server.api.body import ResponseRequest, require_sound
from memdec.server.api.completions import BEFORE_ENGINE, Event, answer
from memdec.server.api.openapi import answered, with_memory
from memdec.server.engine.openai_layer import (
    ResponsesResponse,
    cancel_responses,
    create_responses,
    retrieve_responses,
    validate_json_request,
)
from memdec.server.engine.responses import MemoryResponses
from memdec.server.errors import RequestError, UnknownResponse
from memdec.server.routing.selection import Selection

router = APIRouter()


@dataclass(frozen=True)
class Stored:
    """What we know of a response that vLLM keeps."""

    key: str | None
    """Name of the API key that asked; None: the server has no keys."""
    selection: Selection


@router.post("/v1/responses", **with_memory(ResponsesResponse), dependencies=[Depends(validate_json_request), Depends(require_sound)])
async def responses(request: ResponseRequest, raw_request: Request) -> Response:
    """OpenAI's responses, with `domain`, `lambda` and `memory` as further fields or headers."""
    serving = raw_request.app.state.openai_serving_responses
    if request.previous_response_id is not None:
        _find(request.previous_response_id, raw_request, "previous_response_id")
    if request.request_id in _known(raw_request):
        raise RequestError(f"request_id: there is a response {request.request_id[:80]!r} already.", "request_id")
    if request.max_output_tokens is not None and request.max_output_tokens < 1:  # vLLM would speak of max_tokens
        raise RequestError(f"max_output_tokens is {request.max_output_tokens}. It must be at least 1.", "max_output_tokens")
    response = await answer(_create, request, raw_request)
    if request.store and serving.enable_store and response.status_code == 200:
        _known(raw_request)[request.request_id] = Stored(_key(raw_request), raw_request.state.selection)
    return response


@router.get("/v1/responses/{response_id}", **answered(ResponsesResponse))
async def retrieve(response_id: str, raw_request: Request, starting_after: int | None = None, stream: bool = False) -> Response:
    """A stored response, or the events of one that was asked for in the background."""
    stored = _find(response_id, raw_request)
    serving = raw_request.app.state.openai_serving_responses
    if stream and response_id not in serving.event_store:
        raise RequestError("This response has no events to stream: that takes background and stream.", "stream")
    response: Response = await retrieve_responses(response_id, raw_request, starting_after, stream)
    response.headers.update(stored.selection.headers())
    return response


@router.post("/v1/responses/{response_id}/cancel", **answered(ResponsesResponse))
async def cancel(response_id: str, raw_request: Request) -> Response:
    """End a response that was asked for in the background."""
    stored = _find(response_id, raw_request)
    response: Response = await cancel_responses(response_id, raw_request)
    response.headers.update(stored.selection.headers())
    return response


async def _create(request: ResponseRequest, raw_request: Request) -> Response:
    """vLLM's answer; a stream that breaks after its beginning ends with an event that says so."""
    response: Response = await create_responses(request, raw_request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _ended(aiter(response.body_iterator), raw_request.app.state.openai_serving_responses)
    return response


async def _ended(events: AsyncIterator[Event], serving: MemoryResponses) -> AsyncIterator[Event]:
    """End a stream that breaks with an error event. An error before the engine's first event is raised: it can still be an HTTP error."""
    count, begun = 0, False
    try:
        async for event in events:
            begun = begun or not (isinstance(event, str) and event.startswith(BEFORE_ENGINE))
            count += 1
            yield event
    except Exception as error:
        if not begun:
            raise
        logging.getLogger("memdec.responses").warning("a stream broke off: %s", error)
        yield f"event: error\ndata: {serving.error_event(error, count).model_dump_json()}\n\n"


def _known(raw_request: Request) -> dict[str, Stored]:
    """Id -> what we know of each stored response. Like vLLM's own store it only grows."""
    state = raw_request.app.state
    if not hasattr(state, "stored_responses"):
        state.stored_responses = {}
    responses: dict[str, Stored] = state.stored_responses
    return responses


def _key(raw_request: Request) -> str | None:
    key = getattr(raw_request.state, "key", None)
    return key.name if key is not None else None


def _find(response_id: str, raw_request: Request, param: str = "response_id") -> Stored:
    """A stored response of this API key. Raises UnknownResponse, whether there is none or it is another key's."""
    stored = _known(raw_request).get(response_id)
    if stored is None or stored.key != _key(raw_request):
        kept = raw_request.app.state.openai_serving_responses.enable_store
        why = "" if kept else " This server stores none: that takes VLLM_ENABLE_RESPONSES_API_STORE=1 in its environment."
        raise UnknownResponse(f"There is no response {response_id[:80]!r}.{why}", param)
    return stored
