"""Entry point `vllm.endpoint_plugins`: our routes in vLLM's own server, in the place of its routes of the same paths.

For what only vLLM's launcher does, such as several API server processes. `memdec serve … --print-vllm` prints the command; vLLM loads the plugin only
where VLLM_PLUGINS names it. Each API server process has its own engine client, which becomes a MemoryEngine here.
"""

from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import vllm
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from memdec.decoders.retrieval import RetrievalPackage
from memdec.server import metrics
from memdec.server.api import catalogue, completions
from memdec.server.api.app import error_response, http_error
from memdec.server.api.limits import Limits
from memdec.server.api.middleware import AnswerCount, BodyLimit, RetryLater
from memdec.server.api.routed import Routed
from memdec.server.engine.client import MemoryEngine
from memdec.server.errors import MemdecError
from memdec.server.retrieval.rag import PassageFinder
from memdec.server.routing.domains import Domain, Domains


class MemoryRoutes:
    """What vLLM asks of an endpoint plugin."""

    name = "memdec_routes"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, their errors and the layers around them."""
        app.include_router(completions.router)
        app.include_router(catalogue.router)
        app.exception_handler(HTTPException)(http_error)  # Starlette's own 404 and 405 in OpenAI's form
        app.exception_handler(MemdecError)(error_response)
        app.add_middleware(BodyLimit, limit=Limits().max_body_bytes)
        app.add_middleware(RetryLater)
        app.add_middleware(AnswerCount)
        app.add_middleware(Routed, routes=app.router.routes)

    async def init_state(self, engine_client: Any, state: Any, _: Namespace) -> None:
        """Turn the engine's client into ours, and tell the routes what there is."""
        served = engine_client.vllm_config.model_config.hf_config.memory_decoder["served"]
        domains = Domains(served["base"], tuple(Domain.of(told) for told in served["domains"]))
        engine_client.__class__ = MemoryEngine
        engine_client.equip()
        stores = {d.name: d.datastore for d in domains if d.datastore is not None}
        engine_client.finders = {
            name: PassageFinder.open(RetrievalPackage.read(Path(store.path)), engine_client.renderer.tokenizer)
            for name, store in stores.items()
        }
        metrics.BUILD.labels(version("memdec"), vllm.__version__, torch.__version__, domains.base).set(1)
        for domain in domains:
            metrics.DOMAIN.labels(domain.name, domain.revision).set(1)
        state.domains, state.limits = domains, Limits()
        state.openai_serving_models.model_name = lambda _lora=None: completions.asked_model.get() or domains.base
