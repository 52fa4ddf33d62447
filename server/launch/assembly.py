"""Joins engine client and app, in the same way for `memdec serve` and for vLLM's own server."""

from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import vllm
from fastapi import FastAPI

from memdec.decoders.reading.retrieval import RetrievalPackage
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.server import metrics
from memdec.server.api.app import assemble, inform
from memdec.server.api.settings import Settings, Web
from memdec.server.engine import openai_layer as vllm_api
from memdec.server.engine.client import MemoryEngine
from memdec.server.engine.domain_updates import DomainUpdates
from memdec.server.engine.loaded_domains import LoadedDomains
from memdec.server.engine.shadows import Shadows, baselines_of
from memdec.server.retrieval.rag import PassageFinder


def equip(engine: MemoryEngine, settings: Settings) -> DomainUpdates | None:
    """Give a MemoryEngine its domains, RAG passages, baseline replays and metric labels; returns what changes the domains, if they may change."""
    models = settings.models
    engine.liveness.limit = settings.limits.step_timeout
    engine.takes_priorities = not settings.baseline_sample_rate  # with shadowing, priority scheduling serves the replays alone
    metrics.BUILD.labels(version("memdec"), vllm.__version__, torch.__version__, models.domains.base).set(1)
    engine.loaded = LoadedDomains(models.domains, models.spec.first_slots)
    stores = {d.name: d.datastore for d in models.domains if d.datastore is not None}
    tokenizer = load_tokenizer(models.base) if stores else None
    engine.finders = {n: PassageFinder.open(RetrievalPackage.read(Path(s.path)), tokenizer) for n, s in stores.items()}
    if settings.baseline_sample_rate:
        ngrams = {d.name: d.ngrams.lam for d in models.domains if d.ngrams is not None}
        both = {d.name: (d.lam, d.both.lam) for d in models.domains if d.both is not None}
        baselines = baselines_of({name: store.lam for name, store in stores.items()}, models.domains.names, ngrams, both)
        engine.shadows = Shadows(engine, settings.baseline_sample_rate, baselines)
    return DomainUpdates(engine, models, settings.updates) if settings.updates is not None else None


def app_of(args: Namespace, settings: Settings, say_ready: Callable[[], None]) -> FastAPI:
    """The app, without its state. `args` are vLLM's; `say_ready` is called once, when requests are taken."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with vllm_api.lifespan(app):
            say_ready()
            yield

    return assemble(settings, web_of(args), lifespan)


def web_of(args: Namespace) -> Web:
    """The app's settings from vLLM's arguments."""
    return Web(
        partial(vllm_api.add_middleware, args=args), not args.disable_fastapi_docs, args.root_path or "",
        tuple(args.allowed_origins), args.allow_credentials, tuple(args.allowed_methods), tuple(args.allowed_headers), args.enable_tokenizer_info_endpoint,
    )  # fmt: skip


async def app_around(engine: MemoryEngine, args: Namespace, settings: Settings, say_ready: Callable[[], None]) -> FastAPI:
    """The app of `memdec serve`, around a running engine."""
    updates = equip(engine, settings)
    app = app_of(args, settings, say_ready)
    await vllm_api.init_app_state(engine, app.state, args, await engine.get_supported_tasks())
    inform(app.state, settings, engine.loaded, updates)
    return app
