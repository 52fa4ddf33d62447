"""What a person sees: `/`, which names the endpoints, and the documentation pages, whose scripts come with the server."""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from starlette.routing import Route

from memdec.server.json_types import JsonObject

router = APIRouter()
docs = APIRouter(include_in_schema=False)
OPENAPI, ASSETS = "/openapi.json", "/docs/assets"
FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js", "favicon.png")
DAY = "private, max-age=86400"


@router.get("/")
async def index(request: Request) -> JsonObject:
    """The endpoints of this server, and where they are documented."""
    app, root = request.app, request.scope.get("root_path", "").rstrip("/")
    endpoints = {
        f"{method} {root}{route.path}": (route.endpoint.__doc__ or route.name.replace("_", " ")).strip().splitlines()[0]
        for route in app.routes
        if isinstance(route, Route) and getattr(route, "include_in_schema", False)
        for method in sorted((route.methods or set()) - {"HEAD"})
    }
    described = {"openapi": f"{root}{OPENAPI}", "docs": f"{root}/docs", "redoc": f"{root}/redoc"} if app.openapi_url else {}
    return {"name": "memdec", "version": version("memdec"), **described, "endpoints": endpoints}


@docs.get("/docs")
async def swagger(request: Request) -> HTMLResponse:
    """The endpoints, with forms to try them."""
    root, title = request.scope.get("root_path", "").rstrip("/"), request.app.title
    at = f"{root}{ASSETS}"
    return get_swagger_ui_html(
        openapi_url=f"{root}{OPENAPI}", title=title, swagger_js_url=f"{at}/{FILES[0]}", swagger_css_url=f"{at}/{FILES[1]}",
        swagger_favicon_url=f"{at}/{FILES[3]}",
    )  # fmt: skip


@docs.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    """The endpoints, to read."""
    root, title = request.scope.get("root_path", "").rstrip("/"), request.app.title
    at = f"{root}{ASSETS}"
    return get_redoc_html(
        openapi_url=f"{root}{OPENAPI}", title=title, redoc_js_url=f"{at}/{FILES[2]}", redoc_favicon_url=f"{at}/{FILES[3]}",
        with_google_fonts=False,
    )  # fmt: skip


@docs.get(ASSETS + "/{name}")
async def asset(name: str) -> FileResponse:
    """One of the pages' four files, from the package fastapi-offline."""
    if name not in FILES:
        raise HTTPException(404)
    return FileResponse(_folder() / name, headers={"Cache-Control": DAY})


def _folder() -> Path:
    """The folder of fastapi-offline's files; the package itself isn't imported."""
    spec = find_spec("fastapi_offline")
    if spec is None or spec.origin is None:
        raise HTTPException(404, "The package fastapi-offline, which has this page's files, is not installed.")
    return Path(spec.origin).parent / "static"
