"""Our own options: parsed and checked before anything heavy is imported. vLLM's are left as words."""

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from memdec import flags
from memdec.flags import flag
from memdec.server.api.keys import Key
from memdec.server.api.limits import Limits
from memdec.server.choice import MAX_SLOT
from memdec.server.engine.settings import LOAD_SECONDS, UpdateOptions
from memdec.server.errors import StartupError
from memdec.server.naming import packages_in, parse_named, require_folder

ADMIN_KEY = "MEMDEC_ADMIN_KEY"
API_KEY = "VLLM_API_KEY"  # vLLM's name for it
MOST_DRAFTED = 16  # tokens
DRAFTED_ON_CPU = 6


@dataclass(frozen=True)
class Options:
    """Options of `memdec serve`; each field is a flag. Those that limit clients are in Limits."""

    decoder: tuple[str, ...] = flag((), "a domain's decoder: a package or a plain checkpoint", "NAME=PATH")
    decoder_dir: tuple[Path, ...] = flag((), "all decoder packages in a folder, each named like its own folder", "DIR")
    datastore: tuple[str, ...] = flag((), "a domain's retrieval baselines, made by memdec retrieval", "NAME=PATH")
    ngram: tuple[str, ...] = flag(
        (), "a domain's n-gram memory: made by memdec ngram, or a folder of text; it needs no decoder", "NAME=PATH"
    )
    skip_broken_datastores: bool = flag(False, "serve without a datastore that is damaged or another base's")
    baseline_sample_rate: float = flag(
        0.0,
        "share of the decoder requests that is replayed at low priority with the base alone and the domain's baselines (default: 0)",
        "SHARE",
        least=0,
        most=1,
    )
    enable_domain_updates: bool = flag(False, "load, replace and unload decoders at run time: POST and DELETE /v1/domains")
    admin_key: str | None = flag(None, f"the key that changes domains (better: {ADMIN_KEY} in the environment)", "KEY")
    max_decoders: int | None = flag(None, "decoders that may be loaded at once (default: one more than at the start)")
    domain_root: tuple[Path, ...] = flag((), "folder that decoders may be loaded from at run time (default: those of --decoder-dir)", "DIR")
    domain_load_timeout: float | None = flag(
        None,
        f"time that reading, checking and loading a decoder at run time may take (default: {LOAD_SECONDS:g})",
        "SECONDS",
        least=1,
        most=86_400,
    )
    speculate: int | None = flag(
        None,
        f"most tokens that a request's memory drafts ahead in a step; 0: none (default: {DRAFTED_ON_CPU} on CPUs, 0 on CUDA)",
        "K",
        least=0,
        most=MOST_DRAFTED,
    )
    print_vllm: bool = flag(False, "print the command that serves the same with vLLM's own launcher, and exit")


OURS = frozenset(flags.spelling(f.name) for options in (Options, Limits) for f in fields(options))


@dataclass(frozen=True)
class CommandLine:
    """A command line: our options read, vLLM's left as words."""

    options: Options
    limits: Limits
    api_keys: tuple[str, ...]
    """The secrets of `--api-key`, or of VLLM_API_KEY."""
    words: tuple[str, ...]
    """vLLM's options, MODEL among them."""
    given: frozenset[str]
    """Names of all options that were given, as words or in the --config file: `--port`."""


@dataclass(frozen=True)
class Checked:
    """The result of checking our options, for which small files are read but no model."""

    decoders: tuple[str, ...]
    """NAME=PATH of each, those of --decoder-dir included."""
    keys: tuple[Key, ...]
    updates: UpdateOptions | None


def parse(argv: Sequence[str]) -> CommandLine:
    """Read our options, from words and from vLLM's `--config FILE`. Raises StartupError; exits with 2, as argparse does, at a malformed value."""
    words = _normal(argv)
    config = read_config(words)
    parser = ArgumentParser(prog="memdec serve", add_help=False, allow_abbrev=False)
    flags.add(parser, Options)
    flags.add(parser, Limits)
    parser.add_argument(
        "--api-key", nargs="+", default=_listed(config.get("api-key", []))
    )  # vLLM's own; our layer asks for it, of all paths
    parsed, rest = parser.parse_known_args([*_words_of(config), *words])
    api_keys = tuple(filter(None, parsed.api_key or [os.environ.get(API_KEY, "")]))
    given = {w.split("=")[0].split(".")[0] for w in words if w.startswith("--")}
    given |= {f"--{key}" for key, value in config.items() if value is not False}
    return CommandLine(flags.read(Options, parsed), flags.read(Limits, parsed), api_keys, tuple(rest), frozenset(given))


def check(line: CommandLine, loaded: Sequence[str] = (), decoders_loaded: int = 0) -> Checked:
    """Refuse whatever can be refused without a model. Raises StartupError.

    `loaded`: names of domains that are there besides those of the command line, of which so many have decoders.
    """
    options = line.options
    line.limits.require_sound(bool(line.api_keys))
    decoders = (*options.decoder, *packages_in(options.decoder_dir))
    named = [parse_named("--decoder", text) for text in decoders]
    ngrams = [parse_named("--ngram", text) for text in options.ngram]
    for _, path in (*named, *ngrams):
        require_folder(path)
    for text in options.datastore:
        parse_named("--datastore", text)
    names = list(dict.fromkeys([*loaded, *(name for name, _ in (*named, *ngrams))]))
    return Checked(decoders, line.limits.keys(line.api_keys, names), updates_of(options, decoders_loaded + len(named), bool(names)))


def updates_of(options: Options, loaded: int, memories: bool) -> UpdateOptions | None:
    """How domains may change; None if they may not. Raises StartupError where options contradict each other.

    `loaded`: decoders at the start; `memories`: whether there is a memory of any kind.
    """
    if not options.enable_domain_updates:
        for name in ("max_decoders", "domain_root", "admin_key", "domain_load_timeout"):
            if getattr(options, name) not in (None, ()):
                raise StartupError(f"{flags.spelling(name)}: has no meaning without --enable-domain-updates")
        return None
    key = options.admin_key or os.environ.get(ADMIN_KEY)
    if not key:
        raise StartupError(f"--enable-domain-updates: wanted an admin key too, in {ADMIN_KEY} or --admin-key")
    if not memories:
        raise StartupError(
            "--enable-domain-updates: wanted at least one --decoder, whose architecture and shape the others share, or one --ngram"
        )
    if not loaded and options.max_decoders is not None:
        raise StartupError("--max-decoders: has no meaning without a --decoder, whose architecture and shape the others share")
    roots = options.domain_root or options.decoder_dir
    if not roots:
        raise StartupError("--enable-domain-updates: wanted at least one --domain-root, a folder that decoders may be loaded from")
    for root in roots:
        if not root.is_dir():
            raise StartupError(f"--domain-root {root}: no such folder")
    default = loaded + 1 if loaded else 0
    slots = default if options.max_decoders is None else options.max_decoders
    if not loaded <= slots <= MAX_SLOT - loaded:
        raise StartupError(f"--max-decoders {slots}: wanted {loaded}, the number of decoders given, or more")
    return UpdateOptions(slots, tuple(root.resolve() for root in roots), key, options.domain_load_timeout or LOAD_SECONDS)


def read_config(words: Sequence[str]) -> Mapping[str, object]:
    """The entries of the `--config FILE` that vLLM's options, and ours, may come from. Raises StartupError."""
    if "--config" not in words:
        return {}
    path = Path(dict(zip(words, [*words[1:], ""], strict=True))["--config"])
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StartupError(f"--config {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(entries, dict) or path.suffix not in (".yaml", ".yml"):
        raise StartupError(f"--config {path}: wanted a .yaml file of options and their values")
    return {str(key).replace("_", "-"): value for key, value in entries.items()}


def _words_of(config: Mapping[str, object]) -> list[str]:
    """Our options of a configuration file, as words."""
    line: list[str] = []
    for name, value in ((f"--{key}", value) for key, value in config.items()):
        if name in OURS and value is not False:
            line += [name] if value is True else [f"{name}={one}" for one in _listed(value)]
    return line


def _listed(value: object) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _normal(argv: Sequence[str]) -> list[str]:
    """Words in one spelling, as vLLM's parser reads them: `-` for `_` in options' names, and `--config FILE` for `--config=FILE`."""
    normal: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            head, dot, tail = name.partition(".")
            name = f"{head.replace('_', '-')}{dot}{tail}"
        normal += [name, value] if name == "--config" and equals else [f"{name}{equals}{value}"]
    return normal
