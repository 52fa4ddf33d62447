"""`memdec serve`: command line -> checked models -> settings -> vLLM's arguments -> engine -> HTTP server -> exit code."""

import asyncio
import sys
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from memdec.server.errors import StartupError
from memdec.server.launch.options import Checked, CommandLine, check, parse

if TYPE_CHECKING:  # nothing heavy is imported before our own options are known to be good
    from memdec.server.api.settings import Settings


def serve(argv: list[str]) -> int:
    """Run the server until it is told to stop; returns the exit code. Raises StartupError."""
    line = parse(argv)
    checked = check(line)

    from memdec.server.launch.environment import set_environment
    from memdec.server.launch.vllm_arguments import fill, parse_vllm, require_safe_loading
    from memdec.server.launch.vllm_command import vllm_command

    set_environment({*line.words, *line.given})
    args = parse_vllm(line.words)
    require_safe_loading(args)
    settings = settle(line, checked, args)
    fill(args, line, settings)
    if line.options.print_vllm:
        print(vllm_command(args, line, settings))
        return 0
    import uvloop

    from memdec.server.engine.client import MemoryEngine
    from memdec.server.engine.sandbox import Sandbox
    from memdec.server.launch.running import run

    sys.setswitchinterval(0.001)  # seconds that the event loop waits for a thread that writes a large answer, each time
    MemoryEngine.sandbox = Sandbox.fork()
    code: int = uvloop.run(run(args, settings))
    return code


def settle(line: CommandLine, checked: Checked, args: Namespace) -> "Settings":
    """Read and check all models and memories, and freeze what was asked for. Raises StartupError."""
    from memdec.server.api.settings import Settings
    from memdec.server.checked_models import check_models, with_datastores, with_ngrams

    names = args.served_model_name or []
    if len(names) > 1:
        raise StartupError("--served-model-name: wanted one name; each domain's alias is made of it")
    hub = {"revision": args.revision, "token": args.hf_token, "cache_dir": args.download_dir}
    models = check_models(args.model, checked.decoders, names[0] if names else None, hub)
    models = with_datastores(models, line.options.datastore, line.options.skip_broken_datastores)
    models = with_ngrams(models, line.options.ngram)
    if checked.updates is not None:
        models = replace(models, slots=checked.updates.slots)
    return Settings(models, line.limits, checked.keys, checked.updates, line.options.baseline_sample_rate)


def run_until_done(argv: list[str]) -> int:
    """`serve`, with Ctrl-C during start-up as an ordinary end."""
    try:
        return serve(argv)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
