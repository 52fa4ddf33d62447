"""The FastAPI app: its routes, errors and middleware, in one place."""

from functools import partial
from importlib.metadata import version

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Lifespan

from memdec.server.api import absent, catalogue, completions, domain_updates, health, metrics_page, openapi, pages, responses
from memdec.server.api.access import Access, keep_known
from memdec.server.api.body import require_sound
from memdec.server.api.keys import Key
from memdec.server.api.middleware import AnswerCount, BodyLimit, FreshStepTimes, KeyConcurrency, RequestId, RequestLog, RetryLater
from memdec.server.api.routed import Routed, allowed
from memdec.server.api.settings import Settings, Web
from memdec.server.api.short_errors import ShortErrors
from memdec.server.engine import off_loop
from memdec.server.engine import openai_layer as vllm_api
from memdec.server.engine.domain_updates import DomainUpdates
from memdec.server.engine.loaded_domains import LoadedDomains, Snapshot
from memdec.server.errors import MemdecError
from memdec.server.in_place import overwrite

METHOD_NOT_ALLOWED = 405


def assemble(settings: Settings, web: Web, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Build the app, with its routes, errors and middleware but without its state."""
    app = FastAPI(
        title="memdec", description="Completions with domain memories", version=version("memdec"), lifespan=lifespan, root_path=web.root_path,
        openapi_url=pages.OPENAPI if web.docs else None, docs_url=None, redoc_url=None, redirect_slashes=False, responses=openapi.ERRORS,
    )  # fmt: skip
    app.include_router(pages.router)
    if web.docs:
        app.include_router(pages.docs)
    app.include_router(completions.router)
    app.include_router(responses.router)
    app.include_router(catalogue.router)
    app.include_router(health.router)
    if web.tokenizer_info:
        app.include_router(catalogue.tokenizer_router)
    if settings.updates is not None:
        app.include_router(domain_updates.router)
    metrics_page.attach(app)
    vllm_api.register_instrumentator_api_routers(app)  # /health, /load, /version, /metrics
    app.include_router(vllm_api.tokenize_router, dependencies=[Depends(vllm_api.validate_json_request), Depends(require_sound)])
    keep_known(app.router.routes)
    app.include_router(absent.absent(web.tokenizer_info))
    openapi.complete(app, bool(settings.keys))

    off_loop.cut_messages()
    vllm_api.init_exception_handler(app)
    for kind in (StarletteHTTPException, HTTPException):
        app.exception_handler(kind)(http_error)
    app.exception_handler(MemdecError)(error_response)
    app.exception_handler(Exception)(unexpected_error)
    _add_layers(app, settings, web)
    return app


def _add_layers(app: FastAPI, settings: Settings, web: Web) -> None:
    """Add the middleware from the innermost to the outermost, which runs first."""
    limits = settings.limits
    app.add_middleware(ShortErrors)
    app.add_middleware(FreshStepTimes)
    app.add_middleware(BodyLimit, limit=limits.max_body_bytes)
    web.add_vllms_layers(app)
    if settings.keys:
        app.add_middleware(KeyConcurrency, limit=limits.max_concurrent_per_key, tokens=limits.max_tokens_per_key, keys=len(settings.keys))
    app.add_middleware(
        Access, keys=settings.keys, admin=Key.of(settings.updates.admin_key, "admin") if settings.updates is not None else None
    )
    app.add_middleware(RetryLater)
    app.add_middleware(RequestId)
    app.add_middleware(AnswerCount)
    app.add_middleware(  # outermost of the refusing layers: it answers preflights, and lets pages of allowed origins read refusals
        CORSMiddleware, allow_origins=web.origins, allow_credentials=web.credentials, allow_methods=web.methods,
        allow_headers=web.headers, expose_headers=openapi.EXPOSED if web.origins else (),
    )  # fmt: skip
    app.add_middleware(Routed, routes=app.router.routes)
    if limits.log_json:
        app.add_middleware(RequestLog)


def inform(state: State, settings: Settings, loaded: LoadedDomains, updates: DomainUpdates | None = None) -> None:
    """Add domains, limits and updates to the app's state, and adjust the serving objects that vLLM has put there.

    `loaded` is the engine client's; `updates` is there where domains may change.
    """
    limits, base = settings.limits, settings.models.domains.base
    state.loaded, state.limits = loaded, limits
    loaded.subscribers.append(partial(_name_models, state))
    if updates is not None:
        state.domain_updates = updates
    vllm_api.equip_responses(state)
    off_loop.tokenise_in_threads(state)
    vllm_api.put_right(state)
    vllm_api.log_no_client_errors()
    vllm_api.build_later(state)
    vllm_api.limit_tokens(state, limits.max_prompt_tokens, limits.max_output_tokens)
    # Answers carry the model name that the client asked for, alias included.
    overwrite(state.openai_serving_models, "model_name", lambda _lora=None: completions.asked_model.get() or base)


def _name_models(state: State, _: Snapshot, snapshot: Snapshot) -> None:
    """Give vLLM's routes the model names of the current domains."""
    paths = state.openai_serving_models.base_model_paths  # one list, which several of vLLM's objects hold
    paths[:] = [vllm_api.BaseModelPath(name=name, model_path=paths[0].model_path) for name in snapshot.domains.models]


async def error_response(_: Request, error: Exception) -> JSONResponse:
    """One of our errors as an answer."""
    if not isinstance(error, MemdecError):  # what Starlette's signature allows, but never calls us with
        raise error
    return JSONResponse(error.to_body(), status_code=error.status, headers=error.headers)


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's and FastAPI's own errors, 404 and 405 among them, in OpenAI's form, with the headers that vLLM's handler drops."""
    if not isinstance(error, StarletteHTTPException):
        raise error
    answer: JSONResponse = await vllm_api.http_exception_handler(request, error)
    answer.headers.update(error.headers or {})
    if error.status_code == METHOD_NOT_ALLOWED:
        answer.headers["Allow"] = allowed(request)
    return answer


async def unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """An unexpected error as a 500. It is answered outside of all layers, so X-Request-Id is added here."""
    answer: JSONResponse = await vllm_api.exception_handler(request, error)
    answer.headers["X-Request-Id"] = getattr(request.state, "request_id", "none")
    return answer
