"""Pure ASGI layers around the app: request ids, limits, the count of answers. What they refuse has OpenAI's form."""

import asyncio
import contextlib
import random
import re
import time
import uuid

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memdec.server import metrics
from memdec.server.api.keys import Key
from memdec.server.api.routed import route_of
from memdec.server.engine.admission import Account, Client, account
from memdec.server.errors import BodyTooLarge, BodyTooSlow, MemdecError, RequestError, TooManyRequests
from memdec.server.logs import REQUESTS
from memdec.server.routing.domains import NONE

REQUEST_ID, LONGEST_ID = b"x-request-id", 256
REQUEST_IDS = re.compile(rb"[!-~]{1,%d}" % LONGEST_ID)
LONGEST_PATH = 200  # characters in the log
RETRY_AFTER = (1, 4)  # seconds
BODY_SECONDS = 60  # for a request's body; a slower client would hold a connection for nothing
COUNTED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")  # routes


class RequestId:
    """Gives every request an id, the client's own X-Request-Id or a random one, and sends it back: OpenAI's SDKs show it as `_request_id`.

    vLLM's part reads the header: the answer's `id` is this one behind `cmpl-` or `chatcmpl-`, and so is what the engine logs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give one request its id. Answers 400 to two ids, and to one that is too long or not printable ASCII."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == REQUEST_ID]
        wrong = len(given) > 1 or not all(REQUEST_IDS.fullmatch(value) for value in given)
        own = uuid.uuid4().hex.encode() if wrong or not given else given[0]
        scope = {**scope, "headers": [*(h for h in scope["headers"] if h[0] != REQUEST_ID), (REQUEST_ID, own)]}
        scope.setdefault("state", {})["request_id"] = own.decode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, own)]
            await send(message)

        if wrong:
            error = RequestError(f"The header X-Request-Id must be given once, with 1 to {LONGEST_ID} printable ASCII characters.")
            await _respond(error, scope, receive, named)
        else:
            await self.app(scope, receive, named)


class KeyConcurrency:
    """Counts each API key's choices and tokens under way, and answers 429 to a key that has reached its limit."""

    def __init__(self, app: ASGIApp, limit: int | None, tokens: int | None = None, keys: int = 1) -> None:
        """`limit` choices and `tokens` are for keys that have none of their own; `keys` is how many there are."""
        self.app, self.limit, self.tokens, self.keys = app, limit, tokens, keys
        self.clients: dict[str, Client] = {}

    @property
    def running(self) -> dict[str, int]:
        """Choices under way by key."""
        return {name: client.choices for name, client in self.clients.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count a request from its first byte until its answer is complete or the client has left; its choices and tokens as soon as they are known."""
        key: Key | None = scope.get("state", {}).get("key")
        if key is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        mine = Account(self._client(key))
        try:
            mine.ask(1)
        except TooManyRequests as error:
            await _respond(error, scope, receive, send)
            return
        token = account.set(mine)
        try:
            await self.app(scope, receive, send)
        finally:
            account.reset(token)
            mine.close()

    def _client(self, key: Key) -> Client:
        client = self.clients.get(key.name)
        if client is None:
            limits = key.concurrent or self.limit, key.tokens or self.tokens
            client = self.clients[key.name] = Client(key.name, *limits, peers=self.keys)
        return client


class RetryLater:
    """Adds Retry-After to every 429 and 503."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add a few seconds, at random: otherwise all refused clients would come back at once."""

        async def with_retry_after(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (429, 503):
                seconds = random.randint(*RETRY_AFTER)  # noqa: S311
                message["headers"] = [*message.get("headers", ()), (b"retry-after", str(seconds).encode())]
            await send(message)

        await self.app(scope, receive, with_retry_after if scope["type"] == "http" else send)


class BodyLimit:
    """Answers 413 to bodies over `limit` bytes, 408 to those that take over `seconds`. It counts what arrives, so chunked bodies are covered too."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float = BODY_SECONDS) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or cut it off."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen, started, complete = 0, False, False
        ends = asyncio.get_running_loop().time() + self.seconds
        length = dict(scope["headers"]).get(b"content-length", b"0")

        async def counted() -> Message:
            nonlocal seen, complete
            if complete:  # after the body, the next message is the client's disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                raise _Slow from None
            complete = not message.get("more_body", False)
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
        except _Slow:
            if started:
                raise
            error = BodyTooSlow(f"The request's body did not arrive within {self.seconds:g} seconds.")
            await _respond(error, scope, receive, send, {"connection": "close"})  # or what still comes would be read as the next request


class AnswerCount:
    """Counts answers by status, and by the mode and domain that the route has left in the request's state."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count one request when its answer is complete; the outermost layer, so that refusals of the others count too."""
        if scope["type"] != "http" or route_of(scope).path not in COUNTED:
            await self.app(scope, receive, send)
            return
        status = 500  # errors that no handler takes are answered outside of this layer

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


class RequestLog:
    """One line of the JSON log for every request: who, what, how long, how it ended. Neither keys nor, unless asked for, prompts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write when the answer is complete, or will never be."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, complete, began = 500, False, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status, complete
            status = message.get("status", status)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        state = scope.setdefault("state", {})
        try:
            await self.app(scope, receive, watched)
        finally:
            client, key, selection = scope.get("client"), state.get("key"), state.get("selection")
            line = {
                "id": state.get("request_id"),
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"][:LONGEST_PATH],
                "status": status,
                "complete": complete,
                "milliseconds": round(1000 * (time.monotonic() - began), 1),
                "key": key.name if key is not None else None,
                "memory": selection.mode if selection is not None else None,
                "domain": selection.domain.name if selection is not None and selection.domain is not None else None,
                "lambda": selection.lam if selection is not None and selection.mixed else None,
            }
            if "prompt" in state:
                line["prompt"] = state["prompt"]
            REQUESTS.info("%s %s", scope["method"], status, extra=line)


class FreshStepTimes:
    """Asks the engine for the time its steps have taken, before each scrape."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refresh the figures before /metrics is answered. If the engine is dead they stay as they were, which is still worth reading."""
        if scope["type"] == "http" and route_of(scope) == ("/metrics", True):
            with contextlib.suppress(Exception):
                metrics.STEP_SECONDS.totals = await asyncio.wait_for(scope["app"].state.engine_client.step_times(), 2)
        await self.app(scope, receive, send)


class _Slow(BaseException):
    """BaseException for the same reason as `_Overflow`."""


class _Overflow(BaseException):
    """BaseException, so that FastAPI's body reader doesn't turn it into a 400."""


async def _respond(error: MemdecError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None) -> None:
    await JSONResponse(error.to_body(), status_code=error.status, headers=headers)(scope, receive, send)
