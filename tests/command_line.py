"""What `memdec serve` does with its arguments before it starts an engine, in this process."""

from argparse import Namespace
from pathlib import Path

from memdec.server.api.settings import Settings
from memdec.server.launch.options import CommandLine, check, parse
from memdec.server.launch.serve import settle
from memdec.server.launch.vllm_arguments import fill, parse_vllm


def given(toys: Path, *words: str) -> tuple[CommandLine, Settings, Namespace]:
    """All that comes of a toy base, decoder a, and these words. Raises StartupError."""
    line = parse([str(toys / "base"), "--decoder", f"a={toys / 'qwen_a'}", "--dtype", "float32", *words])
    checked, args = check(line), parse_vllm(line.words)
    settings = settle(line, checked, args)
    fill(args, line, settings)
    return line, settings, args
