"""vLLM's arguments: parsed by its own parser, then filled in once with what follows from our settings."""

import os
import shutil
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from memdec import flags
from memdec.decoders.reading.files import read_json
from memdec.decoders.reading.tokenizer import TRUST, first_line
from memdec.server.api.limits import QUEUED, Limits
from memdec.server.api.settings import Settings
from memdec.server.checked_models import Models
from memdec.server.errors import StartupError
from memdec.server.launch.front_end import refuse_without_effect
from memdec.server.launch.grammar_options import with_defaults
from memdec.server.launch.options import DRAFTED_ON_CPU, OURS, CommandLine, Options
from memdec.server.launch.tools import choose_parser
from memdec.server.worker.draft_length import drafting

SHUTDOWN_TIMEOUT = 30  # seconds that running requests get at SIGTERM, unless --shutdown-timeout says otherwise
SAFE_FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "dummy")


def parse_vllm(words: Sequence[str]) -> Namespace:
    """Parse vLLM's options. Raises StartupError; exits with 2, as argparse does, at an option that there isn't."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def load_config_file(self, file_path: str) -> list[str]:
            return _without_ours(super().load_config_file(file_path))

    cli_env_setup()
    parser = Parser(
        prog="memdec serve", description="Serve MODEL with memory decoders. Every option of vLLM works too.", allow_abbrev=False
    )
    if any(word in ("-h", "--help") or word.startswith("--help=") for word in words):
        _show_ours(parser)
    try:
        args: Namespace = make_arg_parser(parser).parse_args(with_defaults(words))
        args.model = getattr(args, "model_tag", None) or (args.model if "--config" in words else None)
        if not args.model:
            raise StartupError("MODEL is missing: memdec serve MODEL --decoder NAME=PATH")
        validate_parsed_serve_args(args)
    except RuntimeError as error:  # a CUDA build where there is no GPU
        raise StartupError(f"vLLM finds nothing to run on: {first_line(error)}") from None
    except (ValueError, TypeError) as error:
        raise StartupError(first_line(error).removeprefix("Error: ")) from None
    return args


def _show_ours(parser: ArgumentParser) -> None:
    """Declare our options in vLLM's parser, too, for its help alone."""
    group = parser.add_argument_group("memdec")
    flags.add(group, Options)
    flags.add(group, Limits)
    for action in group._group_actions:
        action.default = SUPPRESS  # the help says it already, in words


def _without_ours(words: Sequence[str]) -> list[str]:
    """A configuration file's words without our options, which were read before."""
    kept, ours = [], False
    for word in words:
        if word.startswith("--"):
            ours = word.replace("_", "-") in OURS | {"--api-key"}
        if not ours:
            kept.append(word)
    return kept


def require_safe_loading(args: Namespace) -> None:
    """Load safetensors alone, and run code that comes with a model only if asked to. Raises StartupError for formats that can hold code."""
    if args.load_format not in SAFE_FORMATS:
        raise StartupError(f"--load-format {args.load_format}: only safetensors are loaded; wanted one of {', '.join(SAFE_FORMATS)}")
    if args.load_format == "auto":
        args.load_format = "safetensors"  # vLLM would fall back to pickles
    os.environ[TRUST] = "1" if args.trust_remote_code else "0"


def fill(args: Namespace, line: CommandLine, settings: Settings) -> None:
    """Fill in what follows from the settings. Raises StartupError where the user's options contradict them."""
    refuse_without_effect(line.given, bool(settings.models.domains.all))
    _refuse(args, line)
    require_supported(settings.models)
    _fill_models(args, settings.models)
    bound_queue(args, settings.limits)
    _fill_engine(args, settings, line.given)
    _fill_drafting(args, line, settings.models)
    choose_parser(args, settings.models.base)
    if settings.limits.log_json:
        _fill_logging(args)
    if args.host is None:
        args.host = "127.0.0.1"  # nothing is reachable from outside, or without a key, unless asked for
    if "--shutdown-timeout" not in line.given:
        args.shutdown_timeout = SHUTDOWN_TIMEOUT


def _refuse(args: Namespace, line: CommandLine) -> None:
    """Refuse values of vLLM's options that don't work with memory decoders."""
    if (args.api_server_count or 1) > 1 and not line.options.print_vllm:
        raise StartupError(
            f"--api-server-count {args.api_server_count}: wanted 1; start several servers behind a load balancer, or see --print-vllm"
        )
    if args.pipeline_parallel_size > 1:
        raise StartupError("--pipeline-parallel-size: memory decoders run beside the whole base, wanted 1")


def _fill_models(args: Namespace, models: Models) -> None:
    """Have vLLM load the composite in place of the base, with a context no longer than any of its models has."""
    if models.positions is not None:
        if args.max_model_len is None or args.max_model_len == -1:
            args.max_model_len = models.positions
        elif args.max_model_len > models.positions:
            raise StartupError(
                f"--max-model-len {args.max_model_len}: base and decoders have at most {models.positions} positions in common; "
                "give that or less, or leave the decoder with the shorter limit out"
            )
    args.model, args.served_model_name = str(models.base), models.domains.models
    args.hf_overrides = {**(args.hf_overrides or {}), **models.overrides()}
    if models.domains.all:
        args.worker_cls = worker_class()
    elif not torch.cuda.is_available() and args.worker_cls == "auto":
        args.worker_cls = "memdec.server.worker.seeds.SeededCPUWorker"


FAIR = "memdec.server.worker.fair.fair_scheduler"  # not imported: it is the engine's process that needs it


def _fill_engine(args: Namespace, settings: Settings, given: Collection[str]) -> None:
    """Replace vLLM's defaults where this server needs other values."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu and not args.enforce_eager and os.environ.get("TORCH_COMPILE_DISABLE") != "1":
        require_compiler()
    if settings.baseline_sample_rate:
        if "--scheduling-policy" in given and args.scheduling_policy != "priority":
            raise StartupError("--scheduling-policy: wanted priority with --baseline-sample-rate; replays come after clients")
        args.scheduling_policy = "priority"  # replays come after clients; equal priorities are served in the order they came
    if args.scheduler_cls is None:
        args.scheduler_cls = FAIR
    if args.structured_outputs_config.backend == "auto":
        # The front end would choose by request, the engine once: what the one accepts could fail in the other.
        args.structured_outputs_config.backend = "xgrammar"
    one_rank = args.tensor_parallel_size == args.pipeline_parallel_size == 1  # of several, one alone would wait for the others for ever
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0" and args.distributed_executor_backend is None and one_rank:
        args.distributed_executor_backend = "uni"
    if on_cpu and args.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        args.kv_cache_memory_bytes = 1 << 30  # vLLM would take most of the machine's memory


def _fill_drafting(args: Namespace, line: CommandLine, models: Models) -> None:
    """Turn `--speculate K` into vLLM's configuration of a drafter."""
    most = line.options.speculate
    if most is None:
        unfit = torch.cuda.is_available() or args.async_scheduling or args.tensor_parallel_size > 1
        most = 0 if unfit else DRAFTED_ON_CPU
    if not most or not models.domains.all:
        return
    if args.tensor_parallel_size > 1:
        raise StartupError("--speculate: wanted --tensor-parallel-size 1; the ranks would draft differently")
    if args.async_scheduling:
        raise StartupError("--async-scheduling: doesn't work with --speculate; leave one of them out")
    if "--scheduler-cls" in line.given:
        raise StartupError("--scheduler-cls: drafting needs its own; leave it out, or give --speculate 0")
    vars(args).update(drafting(most))


def _fill_logging(args: Namespace) -> None:
    from vllm.config.logging import LoggingConfig

    args.logging_config = replace(getattr(args, "logging_config", None) or LoggingConfig(), formatter="json")


def bound_queue(args: Namespace, limits: Limits) -> None:
    """Give vLLM's queue a bound where the user has set none. Raises StartupError if the largest request would never fit."""
    if args.max_num_queued_reqs is None:
        args.max_num_queued_reqs = max(QUEUED, limits.max_choices)
    if args.max_num_queued_reqs < limits.max_choices:
        raise StartupError(
            f"--max-num-queued-reqs {args.max_num_queued_reqs}: a request of {limits.max_choices} choices would never fit; "
            f"wanted at least that, or a lower --max-choices"
        )


def require_compiler() -> None:
    """Raise StartupError where torch.compile would look for a C++ compiler in vain."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise StartupError(f"{compiler}: no such compiler, and torch.compile needs one; install it, or give --enforce-eager")


def worker_class() -> str:
    """`worker_cls` for engines with a composite."""
    return f"memdec.server.worker.v1.{'GPU' if torch.cuda.is_available() else 'CPU'}MemoryWorker"


def require_supported(models: Models) -> None:
    """Raise StartupError if vLLM doesn't know an architecture, or if it is of a kind that can't be part of a composite."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import interfaces, interfaces_base

    unsupported = {
        "has state-space layers": interfaces.is_hybrid,
        "has no attention": interfaces.is_attention_free,
        "keeps recurrent state": interfaces.has_inner_state,
        "takes images or sound": interfaces.supports_multimodal,
        "is a pooling model": interfaces_base.is_pooling_model,
    }
    known = set(ModelRegistry.get_supported_archs())
    wanted = {models.architecture: str(models.base)}
    for domain in (d for d in models.domains if d.decoder):
        wanted[read_json(Path(domain.path) / "config.json")["architectures"][0]] = f"decoder {domain.name}"
    for architecture, owner in wanted.items():
        if architecture not in known:
            raise StartupError(f"{owner}: vLLM has no architecture {architecture!r}")
        model = ModelRegistry.models[architecture].load_model_cls()
        for kind, is_such in unsupported.items():
            if is_such(model):
                raise StartupError(f"{owner}: {architecture} {kind}, which memory decoders don't work with yet")
