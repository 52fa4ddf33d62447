"""`memory_sources` in answers: each choice's list, in the answer's JSON or in the last event of a choice."""

import json
from collections.abc import AsyncIterator

from fastapi.responses import JSONResponse, Response, StreamingResponse

from memdec.server.engine.sources import Collected
from memdec.server.json_types import JsonObject
from memdec.server.routing.selection import SOURCES


def with_sources(response: Response, collected: Collected, n: int) -> Response:
    """Add to an answer the sources that were collected while it was made; `n` choices share each prompt."""
    if isinstance(response, StreamingResponse):
        events = response.body_iterator

        async def extended() -> AsyncIterator[str | bytes | memoryview]:
            async for event in events:
                if isinstance(event, str) and event.startswith("data: {") and '"finish_reason":"' in event:
                    event = f"data: {json.dumps(_extended(json.loads(event[6:]), collected, n), ensure_ascii=False)}\n\n"
                yield event

        response.body_iterator = extended()
        return response
    if response.status_code != 200:
        return response
    return JSONResponse(_extended(json.loads(bytes(response.body)), collected, n), headers=_kept(response))


def _extended(body: JsonObject, collected: Collected, n: int) -> JsonObject:
    for choice in body.get("choices", ()):
        if choice.get("finish_reason") is not None:
            choice[SOURCES] = collected.of_choice(choice["index"], n)
    return body


def _kept(response: Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name not in ("content-length", "content-type")}
