"""Pure ASGI layers around the app: API keys and the limit on request bodies, both answering in OpenAI's form."""

import hmac
from collections.abc import Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooLarge, MemdecError, Unauthorized

OPEN = ("/health",)  # paths that need no key: probes have none


class ApiKey:
    """401 unless the request carries one of the keys as a bearer token."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request; preflight requests of browsers carry no key by design."""
        if scope["type"] != "http" or scope["path"] in OPEN or scope["method"] == "OPTIONS" or self._known(scope):
            return await self.app(scope, receive, send)
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
            return await self.app(scope, receive, send)
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
            await _respond(BodyTooLarge(f"The request's body is over {self.limit:,} bytes, the limit of this server."), scope, receive, send)


class _Overflow(BaseException):
    """BaseException, so that FastAPI's body reader doesn't turn it into a 400."""


async def _respond(error: MemdecError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error.to_body(), status_code=error.status)(scope, receive, send)
