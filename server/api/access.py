"""Who may use which route. A route that isn't in `NEEDS` isn't served, and what matches no route needs a key."""

from collections.abc import Sequence
from enum import Enum

from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from memdec.server.api.keys import Key, find
from memdec.server.api.routed import MatchedRoute, route_of
from memdec.server.errors import AdminKeyNeeded, Forbidden, RequestError, Unauthorized


class Need(Enum):
    """What a route asks of a client. Without API keys, the first three are one."""

    NOTHING = "nothing"
    KEY = "an API key"
    KEY_OF_ALL = "an API key of all domains"
    ADMIN = "the admin key"


NEEDS = {
    "GET /": Need.KEY,
    "GET /health": Need.NOTHING,  # probes have no key
    "GET /live": Need.NOTHING,
    "GET /version": Need.KEY,
    "GET /metrics": Need.KEY_OF_ALL,  # these three show all domains, or the engine's internals
    "GET /load": Need.KEY_OF_ALL,
    "GET /kv_event_sources": Need.KEY_OF_ALL,
    "GET /openapi.json": Need.KEY,
    "GET /docs": Need.KEY,
    "GET /redoc": Need.KEY,
    "GET /docs/assets/{name}": Need.KEY,
    "GET /v1/models": Need.KEY,  # what these four list depends on the key
    "GET /v1/models/{name:path}": Need.KEY,
    "GET /v1/domains": Need.KEY,
    "GET /v1/domains/{name}": Need.KEY,
    "POST /v1/domains": Need.ADMIN,
    "DELETE /v1/domains/{name}": Need.ADMIN,
    "POST /v1/completions": Need.KEY,
    "POST /v1/chat/completions": Need.KEY,
    "POST /v1/responses": Need.KEY,
    "GET /v1/responses/{response_id}": Need.KEY,  # of the key that asked for it, alone
    "POST /v1/responses/{response_id}/cancel": Need.KEY,
    "GET /tokenizer_info": Need.KEY,
    "POST /tokenize": Need.KEY,
    "POST /detokenize": Need.KEY,
}


def need_of(method: str, route: MatchedRoute) -> Need:
    """What a request needs. One that matches no route needs a key too, before it is answered 404."""
    return NEEDS.get(f"{method} {route.path}", Need.KEY) if route.takes else Need.KEY


def keep_known(routes: list[BaseRoute]) -> None:
    """Drop, in place, every route with a method that `NEEDS` doesn't name: mounted apps and websockets, and what a new vLLM may bring."""
    routes[:] = [route for route in routes if isinstance(route, Route) and _known(route)]


def _known(route: Route) -> bool:
    methods = (route.methods or set()) - {"HEAD"}
    return bool(methods) and all(f"{method} {route.path}" in NEEDS for method in methods)


class Access:
    """Answers 401 or 403 unless the request carries, as a bearer token, a key that may use its route.

    The routes find an API key in the request's state. Browsers' preflights carry none: the CORS layer around this one answers them.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key], admin: Key | None) -> None:
        self.app, self.keys, self.admin = app, keys, admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request."""
        error = self._refused(scope) if scope["type"] == "http" else None
        if error is not None:
            await JSONResponse(error.to_body(), status_code=error.status, headers=error.headers)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refused(self, scope: Scope) -> RequestError | None:
        need = need_of(scope["method"], route_of(scope))
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        token = sent[0] if len(sent) == 1 else b""  # of two, another server on the way may have checked the other
        if need is Need.ADMIN:
            return None if self.admin is not None and find([self.admin], token) else AdminKeyNeeded(_message("admin"))
        if need is Need.NOTHING or not self.keys:
            return None
        key = find(self.keys, token)
        if key is None:
            return Unauthorized(_message("API"))
        if need is Need.KEY_OF_ALL and key.domains is not None:
            return Forbidden("This API key is for some domains, and this page tells of all.")
        scope.setdefault("state", {})["key"] = key
        return None


def _message(kind: str) -> str:
    return f"The {kind} key is missing or wrong. Send it as 'Authorization: Bearer KEY'."
