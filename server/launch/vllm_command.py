"""`--print-vllm`: the command with which vLLM's own launcher serves the same, our options included."""

import json
import shlex
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memdec import flags
from memdec.server.api.settings import Settings
from memdec.server.checked_models import Models
from memdec.server.composite_spec import KEY, CompositeSpec, Served, spec_of
from memdec.server.errors import StartupError
from memdec.server.launch.grammar_options import with_defaults
from memdec.server.launch.options import ADMIN_KEY, CommandLine, check, parse
from memdec.server.routing.domains import Domain, Domains

# Options that aren't carried, with their defaults: the composite's configuration or vLLM's options say the same, or they are secret.
NOT_CARRIED: dict[str, Any] = {
    "decoder": (), "decoder_dir": (), "datastore": (), "ngram": (), "skip_broken_datastores": False, "speculate": None, "print_vllm": False, "admin_key": None,
}  # fmt: skip
PLUGINS = "VLLM_PLUGINS=memdec,memdec_routes VLLM_USE_V2_MODEL_RUNNER=0"


def vllm_command(args: Namespace, line: CommandLine, settings: Settings) -> str:
    """The command line; secrets are in it only where vLLM's own option holds them. Raises StartupError for what it can't carry."""
    if not settings.models.domains.all:
        raise StartupError("--print-vllm: wanted at least one --decoder or --ngram; without any, vLLM's own server is the same")
    if line.options.admin_key:
        raise StartupError(f"--print-vllm: --admin-key would be there for all to read; put it into {ADMIN_KEY} where the command runs")
    require_one_process(settings, args.api_server_count or 1)
    theirs = with_defaults(line.words)
    theirs.remove(args.model_tag)
    options = {option: value for option, value in _filled(args, settings).items() if value is not None and option not in line.given}
    added = [word for option, value in options.items() for word in ([option] if value is True else [option, str(value)])]
    if "--api-key" in line.given:  # what VLLM_API_KEY holds stays in the environment
        added += ["--api-key", *line.api_keys]
    overrides = json.dumps({**args.hf_overrides, **carried(spec_of(args.hf_overrides), line, settings).overrides()})
    command = ["vllm", "serve", args.model, *theirs, "--served-model-name", *args.served_model_name, *added, "--hf-overrides", overrides]
    return f"{PLUGINS} {shlex.join(command)}"


def _filled(args: Namespace, settings: Settings) -> dict[str, object]:
    """The values that memdec has filled in, as options of vLLM's."""
    json_log = settings.limits.log_json
    return {
        "--max-model-len": args.max_model_len,
        "--worker-cls": args.worker_cls,
        "--load-format": args.load_format,
        "--host": args.host,
        "--shutdown-timeout": args.shutdown_timeout,
        "--max-num-queued-reqs": args.max_num_queued_reqs,
        "--tool-call-parser": args.tool_call_parser if args.tools_shown else None,
        "--enable-auto-tool-choice": (args.enable_auto_tool_choice and args.tools_shown) or None,
        "--kv-cache-memory-bytes": args.kv_cache_memory_bytes,
        "--scheduling-policy": args.scheduling_policy if settings.baseline_sample_rate else None,
        "--speculative-config": json.dumps(args.speculative_config) if args.speculative_config else None,
        "--scheduler-cls": args.scheduler_cls,
        "--logging-config": json.dumps({"formatter": "json"}) if json_log else None,
        "--disable-uvicorn-access-log": json_log or None,  # ours says more
    }


def carried(spec: CompositeSpec, line: CommandLine, settings: Settings) -> CompositeSpec:
    """The composite's spec with our options in it: they can't be lost on the way without losing the decoders too."""
    slots, roots = (settings.updates.slots or None, settings.updates.roots) if settings.updates is not None else (None, ())
    ours = replace(line.options, max_decoders=slots, domain_root=roots, **NOT_CARRIED)
    domains = settings.models.domains
    options = (*flags.words(ours), *flags.words(line.limits))
    return replace(spec, served=Served(domains.base, tuple(asdict(d) for d in domains), options))


def settings_of(args: Namespace) -> Settings:
    """The settings that `carried` put into the spec, read in a server of vLLM's. Raises StartupError as the command line itself would."""
    spec = CompositeSpec.of(args.hf_overrides or {})
    if spec is None or spec.served is None:
        raise StartupError(f"memdec_routes: wanted the command that memdec serve --print-vllm prints; there is no {KEY} in --hf-overrides")
    domains = Domains(spec.served.base, tuple(Domain.of(entry) for entry in spec.served.domains))
    words = [*spec.served.options, *(["--api-key", *args.api_key] if args.api_key else [])]
    line = parse(words)
    checked = check(line, domains.names, len(spec.decoders))
    models = Models(
        Path(args.model),
        spec.base_architecture,
        domains,
        args.max_model_len,
        checked.updates.slots if checked.updates is not None else 0,
    )
    return Settings(models, line.limits, checked.keys, checked.updates, line.options.baseline_sample_rate)


def require_one_process(settings: Settings, count: int) -> None:
    """Raise StartupError for options whose state is one process's, where there are several API servers."""
    if count == 1:
        return
    for option, given in (
        ("--enable-domain-updates", settings.updates is not None),
        ("--max-concurrent-per-key", settings.limits.max_concurrent_per_key is not None),
        ("--max-tokens-per-key", settings.limits.max_tokens_per_key is not None),
        ("tokens= in --api-key-file", any(key.tokens is not None for key in settings.keys)),
        ("concurrent= in --api-key-file", any(key.concurrent is not None for key in settings.keys)),
    ):
        if given:
            raise StartupError(f"{option}: wanted --api-server-count 1; each process would know of its own requests alone")
