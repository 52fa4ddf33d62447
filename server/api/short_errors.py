"""Shortens errors that quote what a client has sent, whoever made them: all answers pass here."""

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memdec.server.errors import cut
from memdec.server.json_types import JsonObject

LARGEST = 2048
"""Bytes of an error's body."""
FIRST_CUT = 1200  # characters of a message; fewer where its letters take more bytes


class ShortErrors:
    """Cuts the texts of error bodies in OpenAI's form that are over `LARGEST` bytes; in the middle, since the advice stands at the end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold an error's start back until its body is known; other answers pass as they are."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: Message | None = None
        body = b""

        async def shortened(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                held = message
            elif held is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_short(held, body, send)

        await self.app(scope, receive, shortened)


async def _send_short(start: Message, body: bytes, send: Send) -> None:
    if len(body) > LARGEST:
        body = short(body)
        headers = [(name, value) for name, value in start.get("headers", ()) if name.lower() != b"content-length"]
        start = {**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def short(body: bytes) -> bytes:
    """An error's body with its texts cut until it has at most `LARGEST` bytes; what isn't in OpenAI's form is cut off there."""
    try:
        error: JsonObject = json.loads(body)["error"]
        texts = {name: value for name, value in error.items() if isinstance(value, str)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:LARGEST]
    most = FIRST_CUT
    while most and len(body) > LARGEST:
        shorter = {name: cut(value, most if name == "message" else min(most, 100)) for name, value in texts.items()}
        body = json.dumps({"error": {**error, **shorter}}, ensure_ascii=False, separators=(",", ":")).encode()
        most //= 2
    return body[:LARGEST]
