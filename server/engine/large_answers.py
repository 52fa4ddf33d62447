"""vLLM's two answering routes, with large answers built and written in a thread: a choice's log-probabilities are thousands of objects.

vLLM builds all choices of an answer, and its JSON, in one go on the event loop: 128 choices with log-probabilities stop it for seconds. An upstream
answer that is written choice by choice would let us drop this.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.outputs import RequestOutput

from memdec.server.in_place import overwrite

Asked = TypeVar("Asked", CompletionRequest, ChatCompletionRequest)
LARGE = 2000  # tokens and log-probabilities of an answer: some ten milliseconds


@dataclass(frozen=True)
class Unbuilt:
    """An answer whose outputs are complete, but whose response object isn't built yet."""

    build: Callable[[], CompletionResponse | ChatCompletionResponse | ErrorResponse]

    def written(self) -> tuple[bytes, int]:
        """JSON, as JSONResponse writes it, and the HTTP status. Choice by choice: the interpreter changes threads between two of them."""
        answer = self.build()
        if isinstance(answer, ErrorResponse):
            return _json(answer.model_dump()), answer.error.code
        head = answer.model_copy(update={"choices": []}).model_dump()
        choices = b",".join(_json(choice.model_dump()) for choice in answer.choices)
        fields = (_json(name) + b":" + (b"[" + choices + b"]" if name == "choices" else _json(value)) for name, value in head.items())
        return b"{" + b",".join(fields) + b"}", 200


async def _complete(request: CompletionRequest, raw_request: Request) -> Response:
    return await _answer(raw_request.app.state.openai_serving_completion.create_completion, request, raw_request)


async def _chat(request: ChatCompletionRequest, raw_request: Request) -> Response:
    return await _answer(raw_request.app.state.openai_serving_chat.create_chat_completion, request, raw_request)


create_completion: Callable[[CompletionRequest, Request], Awaitable[Response]] = with_cancellation(load_aware_call(_complete))
"""The route of /v1/completions."""
create_chat_completion: Callable[[ChatCompletionRequest, Request], Awaitable[Response]] = with_cancellation(load_aware_call(_chat))
"""The route of /v1/chat/completions."""


async def _answer(create: Callable[[Asked, Request], Awaitable[object]], request: Asked, raw_request: Request) -> Response:
    """Answer as vLLM's own routes do; an Unbuilt is built and written in a thread."""
    made = await create(request, raw_request)
    headers = metrics_header(raw_request.headers.get("endpoint-load-metrics-format", ""))
    if isinstance(made, Unbuilt):
        body, status = await asyncio.to_thread(made.written)
        return Response(body, status, headers, media_type="application/json")
    if isinstance(made, ErrorResponse):
        return JSONResponse(made.model_dump(), made.error.code)
    if hasattr(made, "model_dump"):
        return JSONResponse(made.model_dump(), headers=headers)
    args = getattr(raw_request.app.state, "args", None)
    events = with_sse_keep_alive(made, float(getattr(args, "sse_keep_alive_interval", 0)))
    return StreamingResponse(events, media_type="text/event-stream")


def build_later(state: State) -> None:
    """Have the app's serving objects leave large answers unbuilt."""
    completion, chat = state.openai_serving_completion, state.openai_serving_chat
    build, full = completion.request_output_to_completion_response, chat.chat_completion_full_generator

    def completed(outputs: list[RequestOutput], *args: object, **kwargs: object) -> CompletionResponse | Unbuilt:
        later = partial(build, outputs, *args, **kwargs)
        return Unbuilt(later) if sum(map(size, outputs)) > LARGE else later()

    async def chatted(
        request: ChatCompletionRequest, results: AsyncIterator[RequestOutput], *args: object, **kwargs: object
    ) -> ChatCompletionResponse | ErrorResponse | Unbuilt:
        final = None
        try:
            async for result in results:
                final = result
        except asyncio.CancelledError:
            return chat.create_error_response("Client disconnected")
        if final is None or size(final) <= LARGE:
            return await full(request, _only(final), *args, **kwargs)
        return Unbuilt(lambda: asyncio.run(full(request, _only(final), *args, **kwargs)))

    overwrite(completion, "request_output_to_completion_response", completed)
    overwrite(chat, "chat_completion_full_generator", chatted)


def size(output: RequestOutput) -> int:
    """Tokens and log-probabilities of one prompt's answers."""
    own = sum(len(step or ()) for step in output.prompt_logprobs or ())
    return own * len(output.outputs) + sum(len(o.token_ids) + sum(map(len, o.logprobs or ())) for o in output.outputs)


async def _only(result: RequestOutput | None) -> AsyncIterator[RequestOutput]:
    """Yield the one result, if there is one."""
    if result is not None:
        yield result


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
