"""Pure ASGI layers around the app: API keys, the limit on request bodies, the count of answers. What they refuse has OpenAI's form."""

import asyncio
import contextlib
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.errors import BodyTooLarge, MemdecError, Unauthorized
from server.routing.domains import NONE

OPEN = ("/health",)  # paths that need no key: probes have none
COUNTED = ("/v1/completions", "/v1/chat/completions")


def is_admin(scope: Scope) -> bool:
    """Whether server.api.domain_updates has found the admin key in a request that needs it."""
    return bool(scope.get("state", {}).get("admin"))


class ApiKey:
    """401 unless the request carries one of the keys as a bearer token."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request; preflight requests of browsers carry no key by design."""
        if scope["type"] != "http" or scope["path"] in OPEN or scope["method"] == "OPTIONS" or is_admin(scope) or self._known(scope):
            await self.app(scope, receive, send)
            return
        await _respond(Unauthorized("The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'."), scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        """Compare in constant time, with every key."""
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = header.partition(b" ")
        matches = [hmac.compare_digest(token.strip(), key) for key in self.keys]
        return bool(scheme.lower() == b"bearer") and any(matches)


class BodyLimit:
    """413 for bodies over `limit` bytes. What arrives is counted, so chunked bodies are covered too."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or cut it off."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen, started = 0, False
        length = dict(scope["headers"]).get(b"content-length", b"0")

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise _Overflow
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            if length.isdigit() and int(length) > self.limit:
                raise _Overflow
            await self.app(scope, counted, watched)
        except _Overflow:
            if started:
                raise
            await _respond(
                BodyTooLarge(f"The request's body is over {self.limit:,} bytes, the limit of this server."), scope, receive, send
            )


class AnswerCount:
    """Counts answers by status, and by the mode and domain that the route has left in the request's state."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count one request when its answer is complete; the outermost layer, so that refusals of the others count too."""
        if scope["type"] != "http" or scope["path"] not in COUNTED:
            await self.app(scope, receive, send)
            return
        status = 500  # of errors that no handler takes: their answer is made outside of this layer

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        state = scope.setdefault("state", {})
        try:
            await self.app(scope, receive, watched)
        finally:
            selection = state.get("selection")
            domain = selection.domain.name if selection is not None and selection.domain is not None else NONE
            metrics.REQUESTS.labels(selection.mode if selection is not None else NONE, domain, str(status)).inc()


class FreshStepTimes:
    """Asks the engine for the time its steps have taken, before each scrape."""

    def __init__(self, app: ASGIApp, engine: Any) -> None:
        self.app, self.engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A dead engine leaves the figures as they were: what it has counted is still worth reading."""
        if scope["type"] == "http" and scope["path"] == "/metrics":
            with contextlib.suppress(Exception):
                metrics.STEP_SECONDS.totals = await asyncio.wait_for(self.engine.step_times(), 2)
        await self.app(scope, receive, send)


class _Overflow(BaseException):
    """BaseException, so that FastAPI's body reader doesn't turn it into a 400."""


async def _respond(error: MemdecError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.to_body(), status_code=error.status)(scope, receive, send)
