"""What one client may ask of the server, and what is written down of it: one field, one option."""

import sys
from argparse import Namespace, _ArgumentGroup
from dataclasses import dataclass, field, fields
from pathlib import Path

from memdec.server.api.keys import Key, read_keys
from memdec.server.errors import StartupError

QUEUED = 1024  # requests under way and waiting together, unless --max-num-queued-reqs says otherwise


@dataclass(frozen=True)
class Limits:
    """Options of `memdec serve`; each field is a flag. None: no limit but the model's own."""

    api_key_file: Path | None = field(
        default=None, metadata={"type": Path, "help": "a file of API keys, one a line, each with what it may use; see docs/operations.md"}
    )
    max_body_bytes: int = field(default=2 << 20, metadata={"type": int, "help": "largest request body accepted (default: 2 MiB)"})
    max_prompt_tokens: int | None = field(default=None, metadata={"type": int, "help": "longest prompt accepted (default: the context)"})
    max_output_tokens: int | None = field(
        default=None, metadata={"type": int, "help": "largest max_tokens accepted, and given to who names none (default: the context)"}
    )
    max_choices: int = field(
        default=128, metadata={"type": int, "help": "answers one request may ask for: n times its prompts (default: 128)"}
    )
    max_concurrent_per_key: int | None = field(
        default=None, metadata={"type": int, "help": "requests under way at once with one API key (default: no limit)"}
    )
    log_json: bool = field(
        default=False, metadata={"type": bool, "help": "write the log to stdout as JSON, a line each, one for every request"}
    )
    log_prompts: bool = field(default=False, metadata={"type": bool, "help": "with --log-json: prompts too"})

    @classmethod
    def add_to(cls, group: _ArgumentGroup) -> None:
        """Declare the options."""
        for f in fields(cls):
            flag, text, kind = f"--{f.name.replace('_', '-')}", f.metadata["help"], f.metadata["type"]
            if kind is bool:
                group.add_argument(flag, action="store_true", help=text)
            else:
                group.add_argument(flag, type=kind, default=f.default, metavar="FILE" if kind is Path else "N", help=text)

    @classmethod
    def of(cls, args: Namespace) -> "Limits":
        """The options of a parsed command line. Raises StartupError naming one that can't be."""
        found = cls(**{f.name: getattr(args, f.name) for f in fields(cls)})
        for f in fields(cls):
            value = getattr(found, f.name)
            if f.metadata["type"] is int and value is not None and value < 1:
                raise StartupError(f"--{f.name.replace('_', '-')} {value}: wanted a number from 1")
        if found.log_prompts and not found.log_json:
            raise StartupError("--log-prompts: wanted with --log-json")
        if found.max_concurrent_per_key is not None and not (found.api_key_file or args.api_key):
            raise StartupError("--max-concurrent-per-key: there are no keys; give --api-key-file or --api-key")
        return found

    def keys(self, given: list[str], domains: list[str]) -> tuple[Key, ...]:
        """The keys of the file and of `--api-key`. Raises StartupError; warns of names of domains that aren't loaded."""
        found = [Key.of(key, f"key-{number}") for number, key in enumerate(filter(None, given), 1)]
        if self.api_key_file is not None:
            found += read_keys(self.api_key_file)
        for key in found:
            for name in sorted((key.domains or frozenset()) - set(domains)):
                print(f"memdec: warning: --api-key-file: key {key.name} names the domain {name!r}, which is not loaded", file=sys.stderr)
        return tuple(found)


def bound_queue(args: Namespace, limits: Limits) -> None:
    """Give vLLM's queue a bound where the user has set none. Raises StartupError if the largest request would never fit."""
    if args.max_num_queued_reqs is None:
        args.max_num_queued_reqs = max(QUEUED, limits.max_choices)
    if args.max_num_queued_reqs < limits.max_choices:
        raise StartupError(
            f"--max-num-queued-reqs {args.max_num_queued_reqs}: a request of {limits.max_choices} choices would never fit; "
            f"wanted at least that, or a lower --max-choices"
        )
