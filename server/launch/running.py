"""Runs the server: opens the socket, starts engine and app, serves HTTP, and ends each of them."""

import sys
import time
from argparse import Namespace
from collections.abc import Awaitable
from socket import socket

from fastapi import FastAPI
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.usage.usage_lib import UsageContext

from memdec.server import logs
from memdec.server.api.protocol import BoundedHttp
from memdec.server.api.settings import Settings
from memdec.server.engine.client import MemoryEngine
from memdec.server.errors import StartupError
from memdec.server.launch import greeting
from memdec.server.launch.assembly import app_around

CONTEXT = UsageContext.OPENAI_API_SERVER


async def run(args: Namespace, settings: Settings) -> int:
    """Serve until a signal, or the engine's death; returns the exit code. `args` are vLLM's. Raises StartupError."""
    if settings.limits.log_json:
        logs.write_json()
    started = time.monotonic()
    sock = _listen(args)
    try:
        engine = _start(args)
        try:

            def say_ready() -> None:
                text = greeting.ready(args, settings.models.domains, engine.model_config.max_model_len, time.monotonic() - started)
                greeting.say(text, settings.limits.log_json)

            stopped = await _serve(await app_around(engine, args, settings, say_ready), sock, args, settings.limits.log_json)
            failed = engine.errored and not engine.draining
        finally:
            engine.shutdown(timeout=engine.vllm_config.shutdown_timeout)
    finally:
        sock.close()
    await stopped
    if failed:
        print("memdec: the engine died; see the log above", file=sys.stderr, flush=True)
    return int(failed)


def _listen(args: Namespace) -> socket:
    """Bind the server's socket, before the engine takes its minute to start. Raises StartupError."""
    try:
        return setup_server(args, reuse_port=False)[1]  # type: ignore[no-any-return]
    except (OSError, OverflowError) as error:
        raise StartupError(f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}") from None


def _start(args: Namespace) -> MemoryEngine:
    """Start the engine. Raises StartupError."""
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=CONTEXT)
        return MemoryEngine.from_vllm_config(  # type: ignore[no-any-return]
            config,
            usage_context=CONTEXT,
            enable_log_requests=args.enable_log_requests,
            disable_log_stats=args.disable_log_stats,
            aggregate_engine_logging=args.aggregate_engine_logging,
        )
    except (ValueError, RuntimeError) as error:
        raise StartupError(f"the engine did not start: {str(error).strip().splitlines()[0]}") from error


async def _serve(app: FastAPI, sock: socket, args: Namespace, log_json: bool) -> Awaitable[None]:
    """Serve HTTP until a signal; the awaitable that is returned ends the connections that are left."""
    stopped: Awaitable[None] = await serve_http(
        app, sock=sock, host=args.host, port=args.port, log_level=args.uvicorn_log_level,
        http=BoundedHttp, ws="none", timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=5,  # otherwise a client that was cut off in mid-answer can delay the exit
        ssl_keyfile=args.ssl_keyfile, ssl_certfile=args.ssl_certfile, ssl_ca_certs=args.ssl_ca_certs, ssl_cert_reqs=args.ssl_cert_reqs, ssl_ciphers=args.ssl_ciphers, enable_ssl_refresh=args.enable_ssl_refresh,
        **_logging(args, log_json),
    )  # fmt: skip
    return stopped


def _logging(args: Namespace, log_json: bool) -> dict[str, object]:
    """uvicorn's log settings: vLLM's options; with the JSON log none, since its line for each request says more than uvicorn's."""
    if log_json:
        return {"access_log": False, "log_config": None}
    config = get_uvicorn_log_config(args)
    return {"access_log": not args.disable_uvicorn_access_log, **({"log_config": config} if config is not None else {})}
