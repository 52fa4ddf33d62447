"""A study's description, read from TOML: which corpora, bases and decoders are compared, and each method's budget.

Paths are relative to the file's folder. An example is docs/study.toml.
"""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from memdec.decoders.build_options import BuildOptions
from memdec.decoders.corpus import STDLIB, Corpus
from memdec.decoders.reading.errors import CorpusError, OptionError
from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE

OPTIONAL = ("rag", "knn", "dapt", "lora")  # methods that may be left out


@dataclass(frozen=True)
class Budget:
    """What is spent on every domain and base."""

    valid_windows: int = 64
    """Validation windows that tune lambda, k, tau and retrieval (256 scored tokens each)."""
    test_windows: int = 160
    """Test windows, spread evenly over the documents."""
    general_windows: int = 24
    """Test windows of the general corpus, on which forgetting is measured."""
    rag_tuning_windows: int = 16
    """Validation windows on which retrieval is tuned."""
    latency_tokens: int = 32
    """Tokens decoded per round when milliseconds per token are measured."""


@dataclass(frozen=True)
class Base:
    """One base model, and what is spent on fine-tuning it."""

    path: Path = Path()
    dapt_tokens: int = 600_000
    """Training tokens of DAPT, the base with all weights tuned; 0 leaves it out."""
    lora_tokens: int = 600_000
    """Training tokens of the LoRA adapter; 0 leaves it out."""
    own_keys: bool = True
    """Whether a datastore of the base's own keys is built, besides the teacher's."""
    rag: bool = True
    """Whether RAG, the slowest method, is scored."""


@dataclass(frozen=True)
class Domain:
    """One corpus and the decoder built on it."""

    name: str
    corpus: str
    """A `--corpus` value."""
    work: Path
    """The build's work folder: tokens, teacher, datastore, student and decoder."""
    options: BuildOptions
    prompts: tuple[str, ...] = ()
    """Prompts that every method continues in the report."""
    bases: tuple[str, ...] = ()
    """Labels of the bases it is measured beside; empty: all."""
    without: tuple[str, ...] = ()
    """Methods of OPTIONAL that are left out."""
    decoder: Path | None = None
    """Folder of a finished decoder. Nothing is built then; the control, and kNN-LM with the teacher's keys, are left out."""


@dataclass(frozen=True)
class Plan:
    """The whole study."""

    budget: Budget
    bases: dict[str, Base]
    """Label -> folder; the first is the one the decoders were built for."""
    domains: tuple[Domain, ...]
    general: str
    """Corpus on which forgetting is measured."""
    work: Path
    """Work folder of the baselines."""

    @classmethod
    def load(cls, file: Path) -> "Plan":
        """Read and check a description. Raises OptionError naming the key."""
        try:
            text = tomllib.loads(file.read_text())
        except OSError as error:
            raise OptionError(f"{file}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise OptionError(f"{file}: not TOML ({error})") from None
        unknown = sorted(text.keys() - {"budget", "bases", "domains", "general", "work", "build"})
        if unknown:
            raise OptionError(f"{file}: unknown key {unknown[0]!r}; wanted budget, bases, domains, general, work, build")
        here = file.resolve().parent
        bases = {name: _base(file, here, name, entry) for name, entry in _table(file, text, "bases").items()}
        shared = _table(file, text, "build", {})
        domains = [_domain(file, here, name, entry, shared, list(bases)) for name, entry in _table(file, text, "domains").items()]
        if not bases or not domains:
            raise OptionError(f"{file}: wanted at least one base and one domain")
        budget = _fill(Budget, _table(file, text, "budget", {}), f"{file}: budget")
        for key in ("general", "work"):
            if not isinstance(text.get(key), str):
                raise OptionError(f"{file}: {key}: wanted a path, found {text.get(key)!r}")
        return cls(budget, bases, tuple(domains), _corpus(here, text["general"], f"{file}: general"), here / text["work"])


def _base(file: Path, here: Path, name: str, entry: object) -> Base:
    """One base of a description. Raises OptionError."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise OptionError(f"{file}: bases.{name}: wanted a table with path")
    base: Base = _fill(Base, {**entry, "path": here / entry["path"]}, f"{file}: bases.{name}")
    if not base.path.is_dir():
        raise OptionError(f"{file}: bases.{name}.path: {base.path}: no such folder")
    return base


def _domain(file: Path, here: Path, name: str, entry: object, shared: dict[str, Any], bases: list[str]) -> Domain:
    """One domain of a description; `shared` are the build options of all, `bases` those that there are. Raises OptionError."""
    if not DOMAIN.fullmatch(name):
        raise OptionError(f"{file}: domains.{name}: wanted {DOMAIN_RULE}")
    if not isinstance(entry, dict) or not {"corpus", "work"} <= entry.keys() or not isinstance(entry["work"], str):
        raise OptionError(f"{file}: domains.{name}: wanted corpus and work")
    own = {k: v for k, v in entry.items() if k not in ("corpus", "work", "prompts", "bases", "without", "decoder")}
    without = entry.get("without", [])
    if not isinstance(without, list) or not set(map(str, without)) <= set(OPTIONAL):
        raise OptionError(f"{file}: domains.{name}.without: {without!r}: wanted a list of {', '.join(OPTIONAL)}")
    beside = entry.get("bases", bases)
    if not isinstance(beside, list) or not beside or not set(map(str, beside)) <= set(bases):
        raise OptionError(f"{file}: domains.{name}.bases: {beside!r}: wanted a list of {', '.join(bases)}")
    prompts = entry.get("prompts", [])
    if not isinstance(prompts, list) or not all(isinstance(p, str) and p for p in prompts):
        raise OptionError(f"{file}: domains.{name}.prompts: {prompts!r}: wanted a list of texts")
    finished = entry.get("decoder")
    if finished is not None and not (isinstance(finished, str) and (here / finished / "config.json").is_file()):
        raise OptionError(f"{file}: domains.{name}.decoder: {finished!r}: wanted the folder of a decoder")
    try:
        options = _fill(BuildOptions, {**shared, **own}, f"{file}: domains.{name}")
    except OptionError as error:
        raise error if str(file) in str(error) else OptionError(f"{file}: domains.{name}: {error}") from None
    return Domain(
        name,
        _corpus(here, entry["corpus"], f"{file}: domains.{name}.corpus"),
        here / entry["work"],
        options,
        tuple(prompts),
        tuple(beside),
        tuple(without),
        here / finished if finished is not None else None,
    )


def _corpus(here: Path, source: Any, where: str) -> str:
    """Resolve a corpus value and check that it can be opened, before anything is trained. Raises OptionError."""
    if not isinstance(source, str):
        raise OptionError(f"{where}: {source!r}: wanted a path")
    path = source if source == STDLIB else str(here / source)
    try:
        Corpus.open(path)
    except CorpusError as error:
        raise OptionError(f"{where}: {error}") from None
    return path


def _table(file: Path, text: dict[str, Any], key: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    value = text.get(key, default)
    if not isinstance(value, dict):
        raise OptionError(f"{file}: {key}: wanted a table, found {value!r}")
    return value


def _fill(kind: Any, values: dict[str, Any], where: str) -> Any:
    """Make a dataclass from a table. Raises OptionError that names an unknown key or a value of the wrong type."""
    known = {f.name: f for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise OptionError(f"{where}: unknown key {key!r}; wanted {', '.join(known)}")
        wanted: type = Path if isinstance(value, Path) else type(known[key].default)
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise OptionError(f"{where}.{key}: {value!r}: wanted {wanted.__name__}")
        least = 0 if key in ("seed", "dapt_tokens", "lora_tokens") else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise OptionError(f"{where}.{key}: {value}: wanted a whole number above {least - 1}")
    return kind(**values)
