"""Bodies of too many things, errors that quote too much, and expressions that would take hours: unit tests, no engine."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from memdec.server.api.bounds import LONGEST_LIST, MOST_NESTED, require_bounded
from memdec.server.api.short_errors import LARGEST, ShortErrors
from memdec.server.engine.off_loop import LONGEST_MESSAGE, cut_messages
from memdec.server.errors import RequestError, UnknownDomain, cut

MESSAGE = {"role": "user", "content": ""}
TOO_MANY: dict[str, tuple[str | None, Any]] = {
    "messages": ("messages", {"messages": [MESSAGE] * 48_000}),
    "stop tokens": ("stop_token_ids", {"stop_token_ids": list(range(250_000))}),
    "parts": ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 50_000}]}),
    "parts of many messages": ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 500}] * 20}),
    "tools": ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}] * 3000}),
    "biases": ("logit_bias", {"logit_bias": {str(i): 1 for i in range(LONGEST_LIST + 1)}}),
    "stops": ("stop", {"stop": ["x"] * (LONGEST_LIST + 1)}),
    "prompts": ("prompt", {"prompt": [[5]] * (MOST_NESTED + 1)}),
    "fields": (None, {str(i): 1 for i in range(LONGEST_LIST + 1)}),
    "a list for a body": (None, [MESSAGE] * 48_000),
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_too_many(name: str) -> None:
    """One line that names the field and what is wanted."""
    field, body = TOO_MANY[name]
    with pytest.raises(RequestError) as caught:
        require_bounded(body)
    assert caught.value.param == field and len(str(caught.value)) < 200


def test_enough() -> None:
    """What real requests hold passes: long prompts of tokens, allowed tokens, chats of thousands of messages, anything that isn't a list."""
    bodies: tuple[Any, ...] = (
        {"prompt": [5] * 900_000}, {"tokens": [5] * 900_000}, {"prompt": [[5] * 9000] * 128}, {"allowed_token_ids": [5] * 150_000},
        {"messages": [MESSAGE] * 2000}, {"stop_token_ids": [5] * 1000}, {"prompt": "x" * 2_000_000}, "x", None, [], {"prompt": []},
    )  # fmt: skip
    for body in bodies:
        require_bounded(body)


LETTERS = ("x", "ä", "語", "\0", '"', "/a", "😀", " ")


@pytest.mark.parametrize("letter", LETTERS)
def test_no_error_quotes_much(letter: str) -> None:
    """Whoever made it, in message and param; its beginning and its end stay; short ones and answers pass untouched."""
    quoted = letter * 400_000

    async def of(request: Request) -> Response:
        if request.url.path == "/ours":
            return JSONResponse(UnknownDomain(f"There is no {quoted}. Valid: a.", quoted).to_body(), 404)
        return JSONResponse({"text": quoted}) if request.url.path == "/answer" else PlainTextResponse(quoted, 500)

    app = ShortErrors(Starlette(routes=[Route(path, of) for path in ("/ours", "/answer", "/text")]))

    async def ask(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path)

    ours = asyncio.run(ask("/ours"))
    error = ours.json()["error"]
    assert len(ours.content) <= LARGEST and ours.status_code == 404 and error.keys() == {"message", "type", "param", "code"}
    assert error["message"].startswith("There is no ") and error["message"].endswith("Valid: a.")
    assert asyncio.run(ask("/answer")).json()["text"] == quoted
    assert len(asyncio.run(ask("/text")).content) <= LARGEST
    assert asyncio.run(ask("/nowhere")).text == "Not Found"


@pytest.mark.parametrize(
    "quoted", ["/a" * 1_000_000, "x" * 2_000_000, "\n" * 1_000_000, '\nFile "' * 200_000], ids=["paths", "text", "lines", "files"]
)
def test_vllm_looks_for_paths_in_short_texts(quoted: str) -> None:
    """Its expressions take quadratic time: a model called /a/a/a/… of 2 MB held the event loop for hours."""
    cut_messages()
    message = create_error_response(f"The model `{quoted}` does not exist.").error.message
    assert len(message) < LONGEST_MESSAGE + 100 and message.endswith("does not exist.")


def test_cut() -> None:
    """Exactly at the bound nothing is left out."""
    assert cut("x" * 100, 100) == "x" * 100
    assert json.dumps(cut("a" * 50 + "b" * 51, 60))[1:3] == "aa" and cut("a" * 50 + "b" * 51, 60).endswith("b" * 20)
