"""`memdec serve`: command line -> checked models -> engine -> HTTP server -> exit code."""

import asyncio
import sys
import time
from argparse import Namespace
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from memdec.decoders.retrieval import RetrievalPackage
from memdec.decoders.tokenizer import load_tokenizer
from memdec.server import logs
from memdec.server.checked_models import Models, check_models, packages_in, with_datastores
from memdec.server.engine.domain_updates import DomainUpdates, UpdateOptions
from memdec.server.errors import StartupError
from memdec.server.launch import greeting
from memdec.server.launch.options import configure, parse, require_safe_loading, set_environment, vllm_command
from memdec.server.retrieval.rag import PassageFinder


def serve(argv: list[str]) -> int:
    """Run the server until it is told to stop; returns the exit code. Raises StartupError."""
    set_environment(argv)
    args = parse(argv)
    require_safe_loading(args)
    models = check_models(args.model, [*args.decoder, *packages_in(args.decoder_dir)], (args.served_model_name or [None])[0])
    models = with_datastores(models, args.datastore, args.skip_broken_datastores)
    updates = UpdateOptions.of(args, models)
    if updates is not None:
        models = replace(models, slots=updates.slots)
    configure(args, models)
    if args.print_vllm:
        print(vllm_command(args, argv))
        return 0
    import uvloop

    code: int = uvloop.run(_serve(args, models, updates))
    return code


async def _serve(args: Namespace, models: Models, options: UpdateOptions | None) -> int:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server
    from vllm.usage.usage_lib import UsageContext

    from memdec.server.api.app import build_app
    from memdec.server.api.protocol import BoundedHttp
    from memdec.server.engine.client import MemoryEngine

    started = time.monotonic()
    context = UsageContext.OPENAI_API_SERVER
    try:
        _, sock = setup_server(args, reuse_port=False)
    except (OSError, OverflowError) as error:
        raise StartupError(f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}") from None
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=context)
        engine = MemoryEngine.from_vllm_config(
            config, usage_context=context, enable_log_requests=args.enable_log_requests, disable_log_stats=args.disable_log_stats
        )
    except (ValueError, RuntimeError) as error:
        raise StartupError(f"the engine did not start: {str(error).strip().splitlines()[0]}") from error
    try:
        await _equip(engine, args, models)
        updates = DomainUpdates(engine, models, options) if options is not None else None

        def say_ready() -> None:
            text = greeting.ready(args, models.domains, engine.model_config.max_model_len, time.monotonic() - started)
            greeting.say(text, args.limits.log_json)

        app = await build_app(engine, args, models.domains, say_ready, updates)
        stopped = await serve_http(
            app, sock=sock, host=args.host, port=args.port, log_level=args.uvicorn_log_level,
            http=BoundedHttp, ws="none", **logs.uvicorn_options(args.limits.log_json, not args.disable_uvicorn_access_log), timeout_keep_alive=5,
            timeout_graceful_shutdown=5,  # or a client cut off in mid-answer can hold the exit up
            ssl_keyfile=args.ssl_keyfile, ssl_certfile=args.ssl_certfile, ssl_ca_certs=args.ssl_ca_certs, ssl_cert_reqs=args.ssl_cert_reqs,
        )  # fmt: skip
        failed = engine.errored and not engine.draining
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
        sock.close()
    await stopped
    if failed:
        print("memdec: the engine died; see the log above", file=sys.stderr, flush=True)
    return int(failed)


async def _equip(engine: Any, args: Namespace, models: Models) -> None:
    """Passages for mode `rag`, the replays of decoder requests, and what the metrics say of this build."""
    import vllm

    from memdec.server import metrics
    from memdec.server.engine.shadows import Shadows, baselines_of

    metrics.BUILD.labels(version("memdec"), vllm.__version__, torch.__version__, models.domains.base).set(1)
    for domain in models.domains:
        metrics.DOMAIN.labels(domain.name, domain.revision).set(1)
    stores = {d.name: d.datastore for d in models.domains if d.datastore is not None}
    tokenizer = load_tokenizer(models.base) if stores else None
    engine.finders = {n: PassageFinder.open(RetrievalPackage.read(Path(s.path)), tokenizer) for n, s in stores.items()}
    if args.baseline_sample_rate:
        baselines = baselines_of({name: store.lam for name, store in stores.items()}, models.domains.names)
        engine.shadows = Shadows(engine, args.baseline_sample_rate, baselines)


def run_until_done(argv: list[str]) -> int:
    """`serve`, with Ctrl-C during start-up as an ordinary end."""
    try:
        return serve(argv)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
