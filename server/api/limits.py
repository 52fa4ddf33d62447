"""Limits on what one client may ask of the server, and options of the log: each field is one option."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from memdec.flags import flag
from memdec.server.api.keys import Key, read_keys
from memdec.server.errors import StartupError

QUEUED = 1024  # requests under way and waiting together, unless --max-num-queued-reqs says otherwise


@dataclass(frozen=True)
class Limits:
    """Options of `memdec serve`; each field is a flag. None: no limit but the model's own."""

    api_key_file: Path | None = flag(None, "a file of API keys, one a line, each with what it may use; see docs/operations.md")
    max_body_bytes: int = flag(2 << 20, "largest request body accepted (default: 2 MiB)", least=1)
    max_prompt_tokens: int | None = flag(None, "longest prompt accepted (default: the context)", least=1)
    max_output_tokens: int | None = flag(None, "largest max_tokens accepted, and given to who names none (default: the context)", least=1)
    max_choices: int = flag(128, "answers one request may ask for: n times its prompts (default: 128)", least=1)
    max_concurrent_per_key: int | None = flag(None, "choices under way at once with one API key (default: no limit)", least=1)
    max_tokens_per_key: int | None = flag(None, "tokens under way with one API key, prompts and max_tokens (default: no limit)", least=1)
    strict_fields: bool = flag(False, "refuse body fields that neither vLLM nor memdec knows, instead of ignoring them")
    step_timeout: int = flag(60, "seconds an engine with work may go without a step; then /health and /live are 503 (default: 60)", least=1)
    log_json: bool = flag(False, "write the log to stdout as JSON, a line each, one for every request")
    log_prompts: bool = flag(False, "with --log-json: prompts too")

    def require_sound(self, has_keys: bool) -> None:
        """Raise StartupError naming an option that has no effect without another. `has_keys`: whether --api-key gives some."""
        if self.log_prompts and not self.log_json:
            raise StartupError("--log-prompts: wanted with --log-json")
        for name, value in (("concurrent", self.max_concurrent_per_key), ("tokens", self.max_tokens_per_key)):
            if value is not None and not (self.api_key_file or has_keys):
                raise StartupError(f"--max-{name}-per-key: there are no keys; give --api-key-file or --api-key")

    def keys(self, given: Iterable[str], domains: Iterable[str]) -> tuple[Key, ...]:
        """The keys of the file and of `--api-key`. Raises StartupError; warns of names of domains that aren't loaded."""
        keys = [Key.of(key, f"key-{number}") for number, key in enumerate(filter(None, given), 1)]
        if self.api_key_file is not None:
            keys += read_keys(self.api_key_file)
        for key in keys:
            for name in sorted((key.domains or frozenset()) - set(domains)):
                print(f"memdec: warning: --api-key-file: key {key.name} names the domain {name!r}, which is not loaded", file=sys.stderr)
        return tuple(keys)
