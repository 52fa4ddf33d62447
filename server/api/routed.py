"""Finds the route of a request once, from its normalised path and method, for all layers."""

from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

ROUTE = "route"  # where the request's state has it


class MatchedRoute(NamedTuple):
    """The route of a request."""

    path: str | None = None
    """As it was declared, such as `/v1/models/{name:path}`; None where there is no such route."""
    takes: bool = False
    """Whether the route takes the request's method; if not, the answer will be a 405."""


class Routed:
    """Removes trailing slashes, treats HEAD as GET, and writes the route to the request's state.

    The server that sends the answer still sees HEAD in its own scope, and leaves the body out.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app, self.routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find one request's route, and pass the request on."""
        if scope["type"] == "http":
            scope.setdefault("state", {})  # layers outside of this one read it too
            scope = {**scope, "path": _path(scope), "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
            scope["state"][ROUTE] = _match(self.routes, scope)
        await self.app(scope, receive, send)


def route_of(scope: Scope) -> MatchedRoute:
    """The route of a request that has passed Routed."""
    route: MatchedRoute = scope.get("state", {}).get(ROUTE, MatchedRoute())
    return route


def allowed(request: Request) -> str:
    """The value of `Allow`: every method that some route of the request's path takes. Starlette names those of the first route alone."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _path(scope: Scope) -> str:
    """The path without trailing slashes; the root of the app keeps its one."""
    stripped, root = scope["path"].rstrip("/"), scope.get("root_path", "").rstrip("/")
    return f"{root}/" if stripped == root else str(stripped)


def _match(routes: Sequence[BaseRoute], scope: Scope) -> MatchedRoute:
    """The route that Starlette's router will choose: the first of that path and method, else the first of that path."""
    matches = [(route.matches(scope)[0], getattr(route, "path", None)) for route in routes]
    for wanted in (Match.FULL, Match.PARTIAL):
        for match, path in matches:
            if match is wanted:
                return MatchedRoute(path, match is Match.FULL)
    return MatchedRoute()
