"""The FastAPI app: which routes, which errors, which middleware, in one place."""

from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from memdec.server.api import catalogue, completions, domain_updates
from memdec.server.api.body import require_sound
from memdec.server.api.limits import Limits
from memdec.server.api.middleware import AnswerCount, ApiKey, BodyLimit, FreshStepTimes, KeyConcurrency, RequestLog, RetryLater
from memdec.server.engine import openai_layer as vllm_api
from memdec.server.errors import MemdecError
from memdec.server.routing.domains import Domains


async def build_app(engine: Any, args: Namespace, domains: Domains, say_ready: Callable[[], None], updates: Any = None) -> FastAPI:
    """Build the app around a running engine. `say_ready` is called once, when requests are taken.

    `updates` is the memdec.server.engine.domain_updates.DomainUpdates of a server whose domains may change.
    """
    limits: Limits = args.limits

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with vllm_api.lifespan(app):
            say_ready()
            yield

    app = FastAPI(title="memdec", description="Completions with domain memories", lifespan=lifespan)
    app.state.domains, app.state.args, app.state.limits = domains, args, limits
    app.include_router(completions.router)
    app.include_router(catalogue.router)
    vllm_api.register_instrumentator_api_routers(app)  # /health, /load, /version, /metrics
    app.include_router(vllm_api.tokenize_router, dependencies=[Depends(vllm_api.validate_json_request), Depends(require_sound)])

    vllm_api.init_exception_handler(app)
    app.exception_handler(HTTPException)(vllm_api.http_exception_handler)  # Starlette's own 404 and 405 in OpenAI's form
    app.exception_handler(MemdecError)(error_response)

    app.add_middleware(FreshStepTimes, engine=engine)
    app.add_middleware(BodyLimit, limit=limits.max_body_bytes)
    vllm_api.init_entrypoints_middleware(Namespace(**{**vars(args), "api_key": None}), app, ("generate",))
    if args.keys:
        app.add_middleware(KeyConcurrency, limit=limits.max_concurrent_per_key)
        app.add_middleware(ApiKey, keys=args.keys)
    app.add_middleware(RetryLater)
    if updates is not None:
        domain_updates.attach(app, updates, args.admin_key)
        updates.publish = partial(_publish, app.state)
    app.add_middleware(AnswerCount)
    if limits.log_json:
        app.add_middleware(RequestLog)  # last added, first run

    await vllm_api.init_app_state(engine, app.state, args, await engine.get_supported_tasks())
    vllm_api.log_no_client_errors()
    vllm_api.limit_tokens(app.state, limits.max_prompt_tokens, limits.max_output_tokens)
    # Answers carry the model name that the client asked for, alias included.
    app.state.openai_serving_models.model_name = lambda _lora=None: completions.asked_model.get() or domains.base
    return app


def _publish(state: Any, domains: Domains) -> None:
    """Tell the routes, and vLLM's, what may be asked for now."""
    state.domains = domains
    paths = state.openai_serving_models.base_model_paths  # one list, which several of vLLM's objects hold
    paths[:] = [vllm_api.BaseModelPath(name=name, model_path=paths[0].model_path) for name in domains.models]


async def error_response(_: Request, error: Exception) -> JSONResponse:
    """One of our errors as an answer."""
    if not isinstance(error, MemdecError):  # what Starlette's signature allows, but never calls us with
        raise error
    return JSONResponse(error.to_body(), status_code=error.status)
