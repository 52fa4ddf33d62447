"""`memdec serve`: command line -> checked models -> engine -> HTTP server -> exit code."""

import asyncio
import json
import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from decoders.package import read_json
from decoders.retrieval import RetrievalPackage
from decoders.tokenizer import TRUST, load_tokenizer
from server import logs
from server.api.limits import Limits, bound_queue
from server.engine.domain_updates import ADMIN_KEY, DomainUpdates, UpdateOptions
from server.engine.draft_length import drafting
from server.errors import StartupError
from server.retrieval.rag import PassageFinder
from server.startup import Models, check_models, packages_in, with_datastores

SHUTDOWN_TIMEOUT = 30  # seconds that running requests get at SIGTERM, unless --shutdown-timeout says otherwise
REFUSED = {"--speculative-config": "speculative_config", "--enable-lora": "enable_lora"}
SAFE_FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "dummy")
UNSUPPORTED = {  # what the model is like, and the attribute by which vLLM's classes say so
    "has state-space layers": "is_hybrid",
    "has no attention": "is_attention_free",
    "keeps recurrent state": "has_inner_state",
    "takes images or sound": "supports_multimodal",
    "is a pooling model": "is_pooling_model",
}
MOST_DRAFTED = 16  # tokens
DRAFTED_ON_CPU = 6
Parser = TypeVar("Parser", bound=ArgumentParser)


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


def set_environment(argv: list[str]) -> None:
    """Defaults that vLLM reads from the environment when it is imported; what the user has set stays."""
    os.environ["MEMDEC_SERVING"] = "1"  # tells server.model.plugin, in child processes, whose children they are
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # routing reaches the step through the V1 runner
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if small_cpu() and any(word.startswith(("--tensor", "--pipeline", "--data-parallel", "-tp", "-pp", "-dp")) for word in argv):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM would give each worker a NUMA node, or cores, of its own
    elif small_cpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # asks for the worker inside the engine's process
    if "--enforce-eager" in argv:
        # One sampler helper has a torch.compile decorator of its own, and would build C++ at the first request with logprobs.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def require_safe_loading(args: Namespace) -> None:
    """Load safetensors alone, and run code that comes with a model only if asked to. Raises StartupError for formats that can hold code."""
    if args.load_format not in SAFE_FORMATS:
        raise StartupError(f"--load-format {args.load_format}: only safetensors are loaded; wanted one of {', '.join(SAFE_FORMATS)}")
    if args.load_format == "auto":
        args.load_format = "safetensors"  # vLLM would fall back to pickles
    os.environ[TRUST] = "1" if args.trust_remote_code else "0"


def small_cpu() -> bool:
    """Whether this is a machine of few cores, where binding a worker process to cores of its own costs more than it brings."""
    return not torch.cuda.is_available() and (os.cpu_count() or 1) <= 4


def parse(argv: list[str]) -> Namespace:
    """Parse our options and all of vLLM's."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    # Ours are taken out first: vLLM's parser warns of every option that is given twice.
    mine, rest = _options(ArgumentParser(prog="memdec serve", add_help=False, allow_abbrev=False)).parse_known_args(argv)
    parser = FlexibleArgumentParser(prog="memdec serve", description="Serve MODEL with memory decoders. Every option of vLLM works too.")
    args: Namespace = make_arg_parser(_options(parser)).parse_args(rest)
    if not getattr(args, "model_tag", None):
        raise StartupError("MODEL is missing: memdec serve MODEL --decoder NAME=PATH")
    args.model = args.model_tag
    vars(args).update(vars(mine))
    args.explicit = {word.split("=")[0].replace("_", "-") for word in rest if word.startswith("--")}
    validate_parsed_serve_args(args)
    return args


def _options(parser: Parser) -> Parser:
    ours = parser.add_argument_group("memdec")
    ours.add_argument(
        "--decoder", action="append", default=[], metavar="NAME=PATH", help="a domain's decoder: a package or a plain checkpoint"
    )
    ours.add_argument(
        "--decoder-dir", action="append", default=[], metavar="DIR", help="all decoder packages in a folder, each named like its own folder"
    )
    ours.add_argument(
        "--datastore", action="append", default=[], metavar="NAME=PATH", help="a domain's retrieval baselines, made by memdec retrieval"
    )
    ours.add_argument("--skip-broken-datastores", action="store_true", help="serve without a datastore that is damaged or another base's")
    ours.add_argument(
        "--baseline-sample-rate",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the decoder requests that is replayed at low priority with the base alone and the domain's baselines (default: 0)",
    )
    ours.add_argument(
        "--enable-domain-updates", action="store_true", help="load, replace and unload decoders at run time: POST and DELETE /v1/domains"
    )
    ours.add_argument("--admin-key", metavar="KEY", help=f"the key that changes domains (better: {ADMIN_KEY} in the environment)")
    ours.add_argument(
        "--max-decoders", type=int, metavar="N", help="decoders that may be loaded at once (default: one more than at the start)"
    )
    ours.add_argument(
        "--domain-root", action="append", default=[], metavar="DIR",
        help="folder that decoders may be loaded from at run time (default: those of --decoder-dir)",
    )  # fmt: skip
    ours.add_argument(
        "--speculate",
        type=int,
        metavar="K",
        help=f"most tokens that a request's memory drafts ahead in a step; 0: none (default: {DRAFTED_ON_CPU} on CPUs, 0 on CUDA)",
    )
    ours.add_argument("--print-vllm", action="store_true", help="print the command that serves the same with vLLM's own launcher, and exit")
    Limits.add_to(ours)
    return parser


def configure(args: Namespace, models: Models) -> None:
    """Fill in what follows from the models. Raises StartupError where the user's options contradict them."""
    from vllm.config.logging import LoggingConfig

    require_supported(models)
    args.limits = Limits.of(args)
    args.keys = args.limits.keys(args.api_key or [], models.domains.names)
    bound_queue(args, args.limits)
    if args.limits.log_json:
        logs.write_json()
        args.logging_config = replace(getattr(args, "logging_config", None) or LoggingConfig(), formatter="json")
    if not 0 <= args.baseline_sample_rate <= 1:
        raise StartupError(f"--baseline-sample-rate {args.baseline_sample_rate}: wanted a number from 0 to 1")
    if args.baseline_sample_rate:
        args.scheduling_policy = "priority"  # replays come after clients; equal priorities are served in the order they came
    if models.positions is not None:
        if args.max_model_len is None or args.max_model_len == -1:
            args.max_model_len = models.positions
        elif args.max_model_len > models.positions:
            raise StartupError(
                f"--max-model-len {args.max_model_len}: base and decoders have at most {models.positions} positions in common; "
                "give that or less, or leave the decoder with the shorter limit out"
            )
    if args.host is None:
        args.host = "127.0.0.1"  # nothing is reachable from outside, or without a key, unless asked for
    if args.structured_outputs_config.backend == "auto":
        # The front end would choose by request, the engine once: what the one accepts could fail in the other.
        args.structured_outputs_config.backend = "xgrammar"
    args.model = str(models.base)
    args.served_model_name = models.domains.models
    args.hf_overrides = {**(args.hf_overrides or {}), **models.overrides()}
    on_cpu = not torch.cuda.is_available()
    if models.domains.all:
        args.worker_cls = f"server.engine.worker.{'CPU' if on_cpu else 'GPU'}MemoryWorker"
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" and args.distributed_executor_backend is None:
        args.distributed_executor_backend = "uni"
    if on_cpu and args.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        args.kv_cache_memory_bytes = 1 << 30  # vLLM would take most of the machine's memory
    for option, given in REFUSED.items():
        if getattr(args, given, None):
            raise StartupError(f"{option}: not supported with memory decoders yet; leave it out")
    _speculate(args, models)
    if args.pipeline_parallel_size > 1:
        raise StartupError("--pipeline-parallel-size: memory decoders run beside the whole base, wanted 1")
    if (args.api_server_count or 1) > 1:
        raise StartupError(f"--api-server-count {args.api_server_count}: wanted 1; start several servers behind a load balancer instead")
    if "--shutdown-timeout" not in args.explicit:
        args.shutdown_timeout = SHUTDOWN_TIMEOUT


def _speculate(args: Namespace, models: Models) -> None:
    """Turn `--speculate K` into vLLM's configuration of a drafter."""
    if args.speculate is None:
        unfit = torch.cuda.is_available() or args.async_scheduling or args.tensor_parallel_size > 1
        args.speculate = 0 if unfit else DRAFTED_ON_CPU
    if not 0 <= args.speculate <= MOST_DRAFTED:
        raise StartupError(f"--speculate {args.speculate}: wanted a number of tokens from 0 to {MOST_DRAFTED}")
    if not args.speculate or not models.domains.all:
        return
    if args.tensor_parallel_size > 1:
        raise StartupError("--speculate: wanted --tensor-parallel-size 1; the ranks would draft differently")
    if args.async_scheduling:
        raise StartupError("--async-scheduling: doesn't work with --speculate; leave one of them out")
    vars(args).update(drafting(args.speculate))


def vllm_command(args: Namespace, argv: list[str]) -> str:
    """`vllm serve` with the same models, and our routes as its plugin: for --api-server-count, and for charts that start vLLM themselves."""
    if not args.hf_overrides or args.enable_domain_updates or args.baseline_sample_rate:
        raise StartupError("--print-vllm: wanted at least one --decoder, and neither --enable-domain-updates nor --baseline-sample-rate")
    _, theirs = _options(ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args(argv)
    theirs.remove(args.model_tag)
    options: dict[str, Any] = {
        "--max-model-len": args.max_model_len,
        "--hf-overrides": json.dumps(args.hf_overrides),
        "--worker-cls": args.worker_cls,
        "--structured-outputs-config.backend": args.structured_outputs_config.backend,
        "--kv-cache-memory-bytes": args.kv_cache_memory_bytes,
        "--speculative-config": json.dumps(args.speculative_config) if args.speculate else None,
        "--scheduler-cls": args.scheduler_cls if args.speculate else None,
    }
    added = [
        word for option, value in options.items() if value is not None and option not in args.explicit for word in (option, str(value))
    ]
    command = ["vllm", "serve", args.model, *theirs, "--served-model-name", *args.served_model_name, *added]
    return f"VLLM_PLUGINS=memdec,memdec_routes VLLM_USE_V2_MODEL_RUNNER=0 {shlex.join(command)}"


def require_supported(models: Models) -> None:
    """Raise StartupError if vLLM doesn't know an architecture, or if it is of a kind that can't be part of a composite."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    wanted = {models.architecture: str(models.base)}
    for domain in models.domains:
        wanted[read_json(Path(domain.path) / "config.json")["architectures"][0]] = f"decoder {domain.name}"
    for architecture, owner in wanted.items():
        if architecture not in known:
            raise StartupError(f"{owner}: vLLM has no architecture {architecture!r}")
        model = ModelRegistry.models[architecture].load_model_cls()
        for kind, flag in UNSUPPORTED.items():
            if getattr(model, flag, False):
                raise StartupError(f"{owner}: {architecture} {kind}, which memory decoders don't work with yet")


async def _serve(args: Namespace, models: Models, options: UpdateOptions | None) -> int:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server
    from vllm.usage.usage_lib import UsageContext

    from server.api.app import build_app
    from server.api.protocol import BoundedHttp
    from server.engine.client import MemoryEngine

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
        app = await build_app(engine, args, models.domains, started, updates)
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

    from server import metrics
    from server.engine.shadows import Shadows, baselines_of

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
