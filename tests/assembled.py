"""The server's own app without an engine behind it: whatever gets past all layers is answered by a mark that names the route."""

import asyncio
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.launchers.cli_args import FrontendArgs

from memdec.server.api.app import assemble
from memdec.server.api.keys import Key
from memdec.server.api.settings import Settings
from memdec.server.engine.settings import UpdateOptions
from memdec.server.launch.assembly import web_of

ADMIN = "sk-admin"


class Engine:
    """Counts how often it is asked for its steps' times."""

    asked = 0

    async def step_times(self) -> dict[str, Any]:
        """Nothing has been done."""
        self.asked += 1
        return {}


@contextmanager
def assembled(keys: Sequence[Key] = (), updates: bool = True, marked: bool = True, **options: Any) -> Iterator[tuple[FastAPI, Engine]]:
    """The app, with options of vLLM's front end, and its engine; its HTTP metrics, which a registry takes once, go with it."""
    known, engine = set(REGISTRY._collector_to_names), Engine()
    args = Namespace(**{**vars(FrontendArgs()), **options})
    nothing: Any = None  # what there is to serve is not asked for
    settings = Settings(nothing, keys=tuple(keys), updates=UpdateOptions(1, (), ADMIN) if updates else None)
    app = assemble(settings, web_of(args))
    app.state.args, app.state.engine_client = args, engine
    for route in app.routes if marked else ():
        assert isinstance(route, Route)
        route.app = _mark(route)
    try:
        yield app, engine
    finally:
        for collector in set(REGISTRY._collector_to_names) - known:
            REGISTRY.unregister(collector)


def _mark(route: Route) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(f"{scope['method']} {route.path}")(scope, receive, send)

    return answer


async def ask(app: ASGIApp, method: str, target: str, *headers: tuple[bytes, bytes]) -> tuple[int, dict[str, str], str]:
    """One request as uvicorn hands it on: status, head, body."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": unquote(target),
        "raw_path": target.encode(), "query_string": b"", "root_path": "", "headers": list(headers), "client": ("test", 1), "server": ("test", 80),
    }  # fmt: skip
    sent: list[Message] = []

    body: Iterator[Message] = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        for message in body:
            return message
        return await asyncio.Future()  # the client stays, and says no more

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    head = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(m.get("body", b"") for m in sent[1:]).decode()
