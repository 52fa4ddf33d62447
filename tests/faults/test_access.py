"""Every route, in every method and spelling, with every kind of key, against a policy written down here: who gets in, who is told what."""

import asyncio

import pytest
from assembled import ADMIN, ask, assembled
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

from memdec.server.api import absent
from memdec.server.api.access import keep_known
from memdec.server.api.keys import Key

pytestmark = pytest.mark.engine

ALL, SOME, NONE = "sk-all", "sk-some", "sk-none"
KEYS = (Key.of(ALL, "all"), Key.of(SOME, "some", frozenset({"a"})), Key.of(NONE, "none", frozenset()))
SENT = {"nobody": None, "wrong": "sk-wrong", "none": NONE, "some": SOME, "all": ALL, "admin": ADMIN}
ANYBODY, USERS, OPERATORS, ADMINS = set(SENT), {"none", "some", "all"}, {"all"}, {"admin"}
POLICY = {
    "GET /health": ANYBODY,
    "GET /live": ANYBODY,
    "GET /": USERS,
    "GET /version": USERS,
    "GET /metrics": OPERATORS,
    "GET /load": OPERATORS,
    "GET /kv_event_sources": OPERATORS,
    "GET /openapi.json": USERS,
    "GET /docs": USERS,
    "GET /redoc": USERS,
    "GET /docs/assets/{name}": USERS,
    "GET /v1/models": USERS,
    "GET /v1/models/{name:path}": USERS,
    "GET /v1/domains": USERS,
    "GET /v1/domains/{name}": USERS,
    "POST /v1/domains": ADMINS,
    "DELETE /v1/domains/{name}": ADMINS,
    "POST /v1/completions": USERS,
    "POST /v1/chat/completions": USERS,
    "POST /v1/responses": USERS,
    "GET /v1/responses/{response_id}": USERS,
    "POST /v1/responses/{response_id}/cancel": USERS,
    "GET /tokenizer_info": USERS,
    "POST /tokenize": USERS,
    "POST /detokenize": USERS,
}
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH", "get")
ORIGIN = "https://app.example"
PREFLIGHT = [(b"origin", ORIGIN.encode()), (b"access-control-request-method", b"POST")]


def bearer(key: str | None) -> list[tuple[bytes, bytes]]:
    """The headers of a client with this key."""
    return [] if key is None else [(b"authorization", f"Bearer {key}".encode())]


def path_of(entry: str) -> str:
    """One path that a route takes."""
    return entry.split()[1].replace("{name:path}", "base").replace("{name}", "a").replace("{response_id}", "r")


def spellings(path: str) -> list[str]:
    """Ways to write a path, or almost."""
    percent = path.replace("e", "%65", 1).replace("o", "%6f", 1)
    return sorted({
        path, f"{path}/", f"{path}//", f"/{path}", f"{path}X", f"{path}/x", f"{path}%2f", f"{path}%00", f"{path};a", f"{path}%3fa", f"{path}/..", f"/.{path}",
        path.upper(), f"{percent}/", f"{path}%20", path.replace("/", "%2f"),
    })  # fmt: skip


async def walk(app: FastAPI) -> set[tuple[str, str]]:
    """Ask for everything; returns who was served by which route. Whoever isn't hears 401 or 403, and with an API key alone 404 or 405."""
    served: set[tuple[str, str]] = set()
    for path in sorted({path_of(entry) for entry in POLICY}):
        for target in spellings(path):
            for method in METHODS:
                for who, key in SENT.items():
                    status, _, body = await ask(app, method, target, *bearer(key))
                    told = f"{who}: {method} {target} is a {status} of {body[:40]}"
                    if status == 200:
                        assert who in POLICY[body] and body.split()[0] == method.replace("HEAD", "GET"), told
                        served.add((who, body))
                    else:
                        assert status in (401, 403) or (status in (404, 405) and who in USERS), told
    return served


def test_every_route_method_spelling_and_key() -> None:
    """Whoever gets through to a route may use it, and whoever may use it gets through."""
    with assembled(KEYS, enable_tokenizer_info_endpoint=True) as (app, _):
        refused = absent.UNMIXED.keys() | absent.NEVER.keys()  # these tell what isn't served, to whoever has a key
        routes = [route for route in app.routes if isinstance(route, Route) and route.path not in refused]
        served = {f"{method} {route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}}
        assert served == POLICY.keys(), "a route came or went: who may use it?"
        assert asyncio.run(walk(app)) == {(who, entry) for entry, allowed in POLICY.items() for who in allowed}


def test_a_trailing_slash_is_nothing() -> None:
    """With it, a route serves and refuses whom it does without."""
    with assembled(KEYS, enable_tokenizer_info_endpoint=True) as (app, _):
        for entry in POLICY:
            for key in SENT.values():
                method, path = entry.split()[0], path_of(entry)
                plain, slash = (asyncio.run(ask(app, method, p, *bearer(key)))[::2] for p in (path, f"{path}/"))
                assert slash == plain, entry


def test_without_keys() -> None:
    """All is open but what changes domains."""
    with assembled(enable_tokenizer_info_endpoint=True) as (app, _):
        for entry, allowed in POLICY.items():
            for key in (None, "sk-wrong"):
                status, _, _ = asyncio.run(ask(app, entry.split()[0], path_of(entry), *bearer(key)))
                assert status == (401 if allowed is ADMINS else 200), entry


def test_keys_that_are_not_one_bearer_token() -> None:
    """Another scheme, or two headers, of which something in front of the server may have read the other."""
    with assembled(KEYS) as (app, _):
        for headers in ([(b"authorization", f"Basic {ALL}".encode())], bearer(ALL) + bearer(ALL), bearer(SOME) + bearer(ALL)):
            status, head, _ = asyncio.run(ask(app, "GET", "/v1/models", *headers))
            assert status == 401 and head["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/metrics", "/v1/completions", "/nope"])
def test_preflights(path: str) -> None:
    """Real ones end in the CORS layer, whatever they ask about; what only looks like one needs a key, and then is a 405 or 404."""
    with assembled(KEYS, allowed_origins=[ORIGIN]) as (app, _):
        status, head, body = asyncio.run(ask(app, "OPTIONS", path, *PREFLIGHT))
        assert (status, body, head["access-control-allow-origin"]) == (200, "OK", ORIGIN)
        status, head, _ = asyncio.run(ask(app, "OPTIONS", path, (b"origin", b"https://other.example"), PREFLIGHT[1]))
        assert status == 400 and "access-control-allow-origin" not in head
        for part in ([], PREFLIGHT[:1], PREFLIGHT[1:]):
            assert asyncio.run(ask(app, "OPTIONS", path, *part))[0] == 401
            assert asyncio.run(ask(app, "OPTIONS", path, *part, *bearer(ALL)))[0] in (404, 405)
            assert asyncio.run(ask(app, "GET", path, *part))[0] == 401


def test_what_a_page_of_an_allowed_origin_can_read() -> None:
    """Headers of ours, and why it was refused; other origins, and all where none is allowed, get no permission."""
    with assembled(KEYS, allowed_origins=[ORIGIN]) as (app, _):
        for key, wanted in ((ALL, 200), (None, 401)):
            status, head, _ = asyncio.run(ask(app, "GET", "/v1/models", PREFLIGHT[0], *bearer(key)))
            assert (status, head["access-control-allow-origin"]) == (wanted, ORIGIN)
            exposed = {name.strip().lower() for name in head["access-control-expose-headers"].split(",")}
            assert {"x-memory-domain", "x-memory-mode", "x-memory-lambda", "x-request-id", "retry-after"} <= exposed
    with assembled(KEYS) as (app, _):
        _, head, _ = asyncio.run(ask(app, "GET", "/v1/models", PREFLIGHT[0], *bearer(ALL)))
        assert not any(name.startswith("access-control") for name in head)


def test_step_times_are_fresh_in_every_spelling() -> None:
    """Whenever /metrics answers, the engine has been asked, and never else."""
    with assembled(KEYS) as (app, engine):
        for target in spellings("/metrics"):
            for method in ("GET", "HEAD", "POST"):
                before = engine.asked
                status, _, _ = asyncio.run(ask(app, method, target, *bearer(ALL)))
                assert engine.asked - before == (1 if status == 200 else 0)
        assert engine.asked >= 6  # plain, slashes, percent; each with GET and HEAD


def test_only_what_is_known_is_served() -> None:
    """A route that no policy names isn't there, nor an app mounted beside the routes, nor a websocket."""

    async def nothing() -> None: ...

    kept: BaseRoute = Route("/health", nothing)
    routes = [
        kept, Route("/health", nothing, methods=["GET", "POST"]), Route("/new", nothing), Route("/metrics", Starlette()), Mount("/metrics", Starlette()),
        WebSocketRoute("/health", nothing),
    ]  # fmt: skip
    keep_known(routes)
    assert routes == [kept]


def test_domains_that_do_not_change() -> None:
    """Without updates their routes aren't there, for the admin key neither."""
    with assembled(KEYS, updates=False) as (app, _):
        for method, path in (("POST", "/v1/domains"), ("DELETE", "/v1/domains/a")):
            assert asyncio.run(ask(app, method, path, *bearer(ALL)))[0] == 405
            assert asyncio.run(ask(app, method, path, *bearer(ADMIN)))[0] == 401
    with assembled(updates=False) as (app, _):
        assert asyncio.run(ask(app, "POST", "/v1/domains", *bearer(ADMIN)))[0] == 405
