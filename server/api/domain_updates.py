"""POST /v1/domains and DELETE /v1/domains/{name}: attached only where domains may change."""

import hmac
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp, Receive, Scope, Send

from memdec.server.api.middleware import is_admin
from memdec.server.errors import AdminKeyNeeded


async def require_admin(request: Request) -> None:
    """Raise AdminKeyNeeded unless the middleware has seen the admin key."""
    if not is_admin(request.scope):
        raise AdminKeyNeeded("The admin key is missing or wrong. Send it as 'Authorization: Bearer KEY'.")


router = APIRouter(dependencies=[Depends(require_admin)])
CHANGING = ("POST", "DELETE")
PATH = "/v1/domains"


class NewDomain(BaseModel):
    """The body of a POST."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    path: str
    """Folder of the decoder on the server's machine: absolute, or relative to one of the --domain-root folders."""


@router.post(PATH)
async def load(body: NewDomain, request: Request) -> JSONResponse:
    """Load a decoder under a new name, 201, or as the next revision of a domain, 200."""
    updates = request.app.state.domain_updates
    domain, new = await updates.load(body.name, body.path)
    return JSONResponse(domain.to_json(), status_code=201 if new else 200)


@router.delete(f"{PATH}/{{name}}")
async def unload(name: str, request: Request) -> dict[str, Any]:
    """Take no more requests for a domain; its decoder is unloaded when the last one is done."""
    await request.app.state.domain_updates.unload(name)
    return {"id": name, "object": "domain", "deleted": True}


class AdminKey:
    """Marks requests that change domains and carry the admin key as a bearer token; the routes want that mark, so nothing else passes."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at one request; the key is compared in constant time."""
        if scope["type"] == "http":
            scope.setdefault("state", {})["admin"] = scope["method"] in CHANGING and scope["path"].startswith(PATH) and self._known(scope)
        await self.app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(token.strip(), self.key) and bool(scheme.lower() == b"bearer")


def attach(app: FastAPI, updates: Any, key: str) -> None:
    """Add the routes, and the layer that knows the key; it must run before the one that knows the API keys."""
    app.state.domain_updates = updates
    app.include_router(router)
    app.add_middleware(AdminKey, key=key)
