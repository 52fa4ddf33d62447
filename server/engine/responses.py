"""vLLM's Responses API with what it lacks: background requests that fail end, their streams too, and passages count as input."""

import asyncio
from collections.abc import AsyncGenerator

from openai.types.responses import ResponseErrorEvent
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse, StreamingResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from memdec.server.engine.answers import Responses
from memdec.server.retrieval.rag import added

LAST = ("response.completed", "error")  # types of the events that end a stream
FAILED = "The server failed to answer. Its log says why."


class MemoryResponses(Responses):
    """The serving object of /v1/responses; an OpenAIServingResponses becomes one in place."""

    async def responses_full_generator(self, *args: object, **kwargs: object) -> ResponsesResponse | ErrorResponse:
        """The answer, with what retrieval put before the prompt in its usage; the one that vLLM has stored is the same object."""
        response = await super().responses_full_generator(*args, **kwargs)
        if isinstance(response, ResponsesResponse) and response.usage is not None:
            response.usage.input_tokens += added.get().tokens
            response.usage.total_tokens += added.get().tokens
        return response

    # vLLM leaves a background request that raises "queued" for ever, and whoever reads its stream waiting. When it ends both itself,
    # what follows can go.

    async def _run_background_request(self, request: ResponsesRequest, *args: object, **kwargs: object) -> None:
        try:
            await super()._run_background_request(request, *args, **kwargs)
        except Exception as error:
            self._fail(request.request_id, error)

    async def _run_background_request_stream(self, request: ResponsesRequest, *args: object, **kwargs: object) -> None:
        try:
            await super()._run_background_request_stream(request, *args, **kwargs)
        except Exception as error:
            events, signal = self.event_store[request.request_id]
            events.append(self.error_event(error, len(events)))  # type: ignore[arg-type]
            self._fail(request.request_id, error)
            signal.set()

    async def responses_background_stream_generator(
        self, response_id: str, starting_after: int | None = None
    ) -> AsyncGenerator[StreamingResponsesResponse, None]:
        """The events of a background request, from the start or after one of them; ends when there will be no more."""
        events, signal = self.event_store.get(response_id) or ((), asyncio.Event())
        at = 0 if starting_after is None else starting_after + 1
        while True:
            signal.clear()
            while at < len(events):
                yield events[at]
                if events[at].type in LAST:
                    return
                at += 1
            if response_id not in self.background_tasks:
                return
            waiting = asyncio.ensure_future(signal.wait())
            await asyncio.wait([waiting, self.background_tasks[response_id]], return_when=asyncio.FIRST_COMPLETED, timeout=1)
            waiting.cancel()

    def error_event(self, error: Exception, number: int) -> ResponseErrorEvent:
        """What ends a stream that can't go on."""
        info = self.create_error_response(error).error
        message = info.message if info.code < 500 or info.code == 503 else FAILED
        return ResponseErrorEvent(type="error", code=str(info.code), message=message, param=info.param, sequence_number=number)

    def _fail(self, response_id: str, error: Exception) -> None:
        stored: ResponsesResponse | None = self.response_store.get(response_id)
        if stored is not None and stored.status not in ("completed", "cancelled"):
            event = self.error_event(error, 0)
            stored.status, stored.error = "failed", {"code": event.code, "message": event.message}
