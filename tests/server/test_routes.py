"""What every route has in common: HEAD, trailing slashes, 405, the pages for people, and the OpenAPI description."""

import asyncio
import json
import re
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from asking import BASE, COMPLETIONS, PROMPT, ask, chat, memory, refused, text
from assembled import ask as asked
from assembled import assembled
from conftest import Server
from openai import BadRequestError, OpenAI
from starlette.types import ASGIApp, Receive, Scope, Send

from memdec.server.api.keys import Key

pytestmark = pytest.mark.engine

PAGES = ("/docs", "/redoc", "/openapi.json", "/docs/assets/redoc.standalone.js")


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/base", "/v1/domains/a", "/metrics", "/version", "/docs"])
def test_routes_answer_head(http: httpx.Client, path: str) -> None:
    """As GET, without the body; the connection goes on."""
    got, head = http.get(path), http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers.get("content-type") == got.headers.get("content-type")
    assert http.get("/v1/models").status_code == 200
    refused_head = http.head(COMPLETIONS)
    assert (refused_head.status_code, refused_head.headers["allow"], refused_head.content) == (405, "POST", b"")


def test_trailing_slashes(http: httpx.Client) -> None:
    """As without, and never by a redirect."""
    for path in ("/v1/models", "/v1/domains", "/v1/models/base", "/v1/domains/a", "/version", "/openapi.json"):
        assert http.get(f"{path}/").json() == http.get(path).json()
    for path in (COMPLETIONS, f"{COMPLETIONS}/", f"{COMPLETIONS}//"):
        assert text(http.post(path, json={**BASE, "domain": "a"})) == text(ask(http, domain="a"))
    assert not http.get("/v1/nope/").has_redirect_location and not http.get("/docs/").has_redirect_location


def test_a_wrong_method_is_told_the_right_ones(http: httpx.Client) -> None:
    """By `Allow`, in OpenAI's form; of all routes of the path."""
    for method, path, wanted in (
        ("GET", COMPLETIONS, "POST"), ("DELETE", "/v1/models", "GET, HEAD"), ("OPTIONS", "/metrics", "GET, HEAD"), ("POST", "/v1/domains", "GET, HEAD"),
    ):  # fmt: skip
        answer = http.request(method, path)
        refused(answer, 405, None)
        assert answer.headers["allow"] == wanted
    with assembled(marked=False) as (app, _):
        for path, wanted in (("/v1/domains", "GET, HEAD, POST"), ("/v1/domains/a", "DELETE, GET, HEAD")):
            status, head, _ = asyncio.run(asked(app, "PUT", path))
            assert (status, head["allow"]) == (405, wanted)


def test_request_ids(http: httpx.Client, sdk: OpenAI) -> None:
    """The SDK has them, of answers, streams and errors; they are the answers' own; a client may bring one."""
    answer = sdk.completions.create(**BASE)  # type: ignore[call-overload]
    assert answer.id == f"cmpl-{answer._request_id}" and len(answer._request_id) == 32
    own = ask(http, {"X-Request-Id": "mine-1"}, stream=True)
    assert own.headers["x-request-id"] == "mine-1" and '"id":"cmpl-mine-1"' in own.text
    with pytest.raises(BadRequestError) as wrong:
        sdk.completions.create(model="base", prompt=PROMPT, extra_body={"lambda": 2})
    assert wrong.value.request_id
    assert http.get("/nope").headers["x-request-id"] != http.get("/nope").headers["x-request-id"]


def test_an_unexpected_error_has_its_id() -> None:
    """A 500 is answered outside of all layers; its id is the one thing that helps to find it in the log."""

    async def broken(_: Scope, __: Receive, ___: Send) -> None:
        raise RuntimeError("broken")

    async def asked_for(app: ASGIApp) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/version", headers={"X-Request-Id": "mine"})

    with assembled() as (app, _):
        next(route for route in app.routes if getattr(route, "path", "") == "/version").app = broken  # type: ignore[attr-defined]
        answer = asyncio.run(asked_for(app))
    refused(answer, 500)
    assert answer.headers["x-request-id"] == "mine"


def test_the_index_names_endpoints_and_documentation(http: httpx.Client) -> None:
    """Each of them, with a line; and where it is described."""
    index = http.get("/").json()
    assert {"POST /v1/completions", "POST /v1/chat/completions", "GET /v1/domains", "GET /health", "GET /metrics"} <= index[
        "endpoints"
    ].keys()
    assert all(index["endpoints"].values())
    for page in ("openapi", "docs", "redoc"):
        assert http.get(index[page]).status_code == 200


def test_pages_need_no_other_host(http: httpx.Client) -> None:
    """Their scripts, styles and icons are this server's, and there."""
    for page in ("/docs", "/redoc"):
        html = http.get(page).text
        loaded = re.findall(r'(?:src|href)="([^"]+)"', html)
        assert len(loaded) >= 2 and "://" not in html.replace("http://www.w3.org", "")
        for path in loaded:
            found = http.get(path)
            assert found.status_code == 200 and len(found.content) > 1000, path
            assert found.headers["cache-control"] == "private, max-age=86400"
    for name in ("index.html", "..%2fcore.py", "%2fetc%2fpasswd"):
        refused(http.get(f"/docs/assets/{name}"), 404, None)


def test_pages_switched_off() -> None:
    """`--disable-fastapi-docs` leaves neither page, nor description, nor files, nor a word of them."""
    key = (b"authorization", b"Bearer k")
    with assembled([Key.of("k", "k")], disable_fastapi_docs=True, marked=False) as (app, _):
        for path in PAGES:
            assert asyncio.run(asked(app, "GET", path, key))[0] == 404
        index = json.loads(asyncio.run(asked(app, "GET", "/", key))[2])
        assert not {"openapi", "docs", "redoc"} & index.keys() and "POST /v1/completions" in index["endpoints"]
    with assembled([Key.of("k", "k")], marked=False) as (app, _):
        assert [asyncio.run(asked(app, "GET", path, key))[0] for path in PAGES] == [200] * 4


def test_the_description() -> None:
    """No route has a 422; the routes of a memory have its headers, in and out; which key a route needs is said."""
    with assembled([Key.of("k", "k")], marked=False) as (app, _):
        description = app.openapi()
        assert description is app.openapi()
    operations = {f"{m.upper()} {p}": o for p, methods in description["paths"].items() for m, o in methods.items()}
    assert "POST /v1/domains" in operations
    titles = [schema.get("title") for schema in description["components"]["schemas"].values()]
    assert len(titles) == len(set(titles)), "generated clients call their classes by these"
    for name, operation in operations.items():
        assert {"400", "default"} <= operation["responses"].keys() and "422" not in operation["responses"], name
        assert list(operation["responses"]["default"]["content"]) == ["application/json"], name
        assert "X-Request-Id" in next(iter(operation["responses"].values()))["headers"], name
    for path in (COMPLETIONS, "/v1/chat/completions"):
        operation = operations[f"POST {path}"]
        assert {p["name"] for p in operation["parameters"] if p["in"] == "header"} == {"X-Domain", "X-Lambda", "X-Memory"}
        answer = operation["responses"]["200"]
        assert {"X-Memory-Mode", "X-Memory-Domain", "X-Memory-Lambda"} <= answer["headers"].keys()
        assert answer["content"]["application/json"]["schema"]["$ref"] and "text/event-stream" in answer["content"]
    assert operations["POST /v1/domains"]["security"] == [{"admin": []}] and "security" not in operations["GET /health"]
    assert operations["GET /metrics"]["security"] == operations["POST /tokenize"]["security"] == [{"key": []}]


def test_a_client_made_from_the_description_chooses_a_domain(server: Server, http: httpx.Client) -> None:
    """By the header that it describes; answers are as described, errors too."""
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = described[COMPLETIONS]["POST"]
    answer = operation.Case(body=dict[str, Any](BASE), media_type="application/json", headers={"X-Domain": "a", "X-Lambda": "0.25"}).call(
        timeout=60
    )
    assert (answer.headers["x-memory-domain"], answer.headers["x-memory-lambda"]) == (["a"], ["0.25"])
    assert answer.json()["choices"][0]["text"] == text(ask(http, domain="a", lam=0.25))


def conforms(description: dict[str, Any], path: str, method: str, answer: httpx.Response) -> None:
    """Check an answer against the schema that the description has for it."""
    responses = description["paths"][path][method]["responses"]
    schema = responses.get(str(answer.status_code), responses["default"])["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json(), {**schema, "components": description["components"]})


def test_answers_are_as_described(http: httpx.Client) -> None:
    """Of each kind of route."""
    description = http.get("/openapi.json").json()
    for path, asked_for in (
        ("/v1/models", "/v1/models"), ("/v1/models/{name}", "/v1/models/base"), ("/v1/domains", "/v1/domains"), ("/v1/domains/{name}", "/v1/domains/a"),
        ("/v1/domains/{name}", "/v1/domains/b"), ("/v1/domains/{name}", "/v1/domains/law"),
    ):  # fmt: skip
        conforms(description, path, "get", http.get(asked_for))
    for fields in ({"domain": "a", "logprobs": 1, "echo": True}, {"domain": "law"}, {"lambda": 2}, {"prompt": 7}):
        conforms(description, COMPLETIONS, "post", ask(http, **fields))  # type: ignore[arg-type]
    answer = chat(http, domain="a")
    conforms(description, "/v1/chat/completions", "post", answer)
    used = description["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["headers"]
    assert {f"x-memory-{name}" for name in memory(answer)} == {name.lower() for name in used if name.startswith("X-Memory")}
