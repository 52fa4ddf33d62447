"""From the command line to vLLM's options: ours parsed beside all of vLLM's, what follows from the models filled in, contradictions refused."""

import json
import os
import shlex
import shutil
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from memdec.decoders.files import read_json
from memdec.decoders.tokenizer import TRUST, first_line
from memdec.server import logs
from memdec.server.api.limits import Limits, bound_queue
from memdec.server.checked_models import Models
from memdec.server.engine.domain_updates import ADMIN_KEY
from memdec.server.errors import StartupError
from memdec.server.worker.draft_length import drafting

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
SPINS = "1000"  # of a waiting thread before it sleeps: some ten microseconds
Parser = TypeVar("Parser", bound=ArgumentParser)


def set_environment(argv: list[str]) -> None:
    """Defaults that vLLM reads from the environment when it is imported; what the user has set stays."""
    os.environ["MEMDEC_SERVING"] = "1"  # tells memdec.server.worker.plugin, in child processes, whose children they are
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # routing reaches the step through the V1 runner
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    wait_briefly()
    if small_cpu() and any(word.startswith(("--tensor", "--pipeline", "--data-parallel", "-tp", "-pp", "-dp")) for word in argv):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM would give each worker a NUMA node, or cores, of its own
    elif small_cpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # asks for the worker inside the engine's process
    if "--enforce-eager" in argv:
        # One sampler helper has a torch.compile decorator of its own, and would build C++ at the first request with logprobs.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def wait_briefly() -> None:
    """Have OpenMP's threads, in the engine's process, spin for a moment and then sleep while they wait for each other; what the user has set stays.

    A step has hundreds of short parallel regions. By default a thread that waits for the next one spins for milliseconds: on a machine that
    has something else to do, spinning uses up its share of the cores, and where it is needed it isn't scheduled, while the others spin for it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS  # GNU's runtime, which comes with torch
        os.environ["KMP_BLOCKTIME"] = "0"  # Intel's, where it is preloaded: milliseconds


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
    try:
        args: Namespace = make_arg_parser(_options(parser)).parse_args(rest)
    except RuntimeError as error:  # a CUDA build where there is no GPU
        raise StartupError(f"vLLM finds nothing to run on: {first_line(error)}") from None
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
    on_cpu = not torch.cuda.is_available()
    if on_cpu and not args.enforce_eager and os.environ.get("TORCH_COMPILE_DISABLE") != "1":
        require_compiler()
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
    if models.domains.all:
        args.worker_cls = worker_class()
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


def require_compiler() -> None:
    """Raise StartupError where torch.compile would look for a C++ compiler in vain."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise StartupError(f"{compiler}: no such compiler, and torch.compile needs one; install it, or give --enforce-eager")


def worker_class() -> str:
    """`worker_cls` for engines with a composite."""
    return f"memdec.server.worker.v1.{'GPU' if torch.cuda.is_available() else 'CPU'}MemoryWorker"


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
