"""From command-line paths to checked models: whatever can be refused is refused here, before any process is started."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from memdec.decoders.reading.errors import DecoderError, PackageError
from memdec.decoders.reading.files import read_json, shown
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.ngram_folder import open_or_index
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.record import BesideRecord, Config, checked
from memdec.decoders.reading.retrieval import RetrievalPackage
from memdec.decoders.reading.shared_tensors import completed
from memdec.decoders.reading.tokenizer import first_line, load_copied, load_tokenizer, require_same_token_map, token_map_hash, trusted
from memdec.decoders.reading.weights import CONFIG, check_weights, fingerprint_model, scan
from memdec.server.composite_spec import CompositeSpec, DatastoreEntry, DecoderEntry, NgramEntry, Served
from memdec.server.errors import StartupError
from memdec.server.json_types import JsonObject
from memdec.server.naming import parse_named, require_folder
from memdec.server.routing.domains import Both, Datastore, Domain, Domains, Ngrams

# config.json entries that may differ between decoders of one shape
NOT_SHAPE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}
SCANNED = 8 << 30  # a base of more bytes is checked for NaN only while vLLM loads it: reading it twice would cost minutes


@dataclass(frozen=True)
class Models:
    """Base and memories, checked and ready for the engine."""

    base: Path
    architecture: str
    domains: Domains
    positions: int | None
    """Longest context that all models have, in tokens; None if no config says."""
    slots: int = 0
    """Decoders that may be loaded at once, if more than there are at the start."""

    def overrides(self) -> JsonObject:
        """vLLM's `hf_overrides`: makes the base's folder load as our composite. Without memories it stays what it is."""
        return self.spec.overrides() if self.domains.all else {}

    @property
    def spec(self) -> CompositeSpec:
        """The composite of base and memories."""
        decoders = tuple(DecoderEntry(d.name, d.path, d.revision) for d in self.domains if d.decoder)
        return CompositeSpec(
            self.architecture,
            decoders,
            tuple(DatastoreEntry(d.name, d.datastore.path) for d in self.domains if d.datastore is not None),
            tuple(NgramEntry(d.name, d.ngrams.path) for d in self.domains if d.ngrams is not None),
            max(self.slots, len(decoders)),
            served=Served(self.domains.base, tuple(asdict(d) for d in self.domains)),
        )


def check_models(base: str, decoders: Iterable[str], served_name: str | None = None, hub: Mapping[str, object] | None = None) -> Models:
    """Resolve MODEL and the `--decoder NAME=PATH` values. Raises StartupError with one line that names what is wrong.

    `hub`: further arguments of `snapshot_download` for models given as hub ids; its revision applies to the base alone.
    """
    try:
        return _check(base, [parse_named("--decoder", d) for d in decoders], served_name, hub or {})
    except DecoderError as error:
        raise StartupError(str(error)) from None


def with_datastores(models: Models, values: Iterable[str], skip_broken: bool) -> Models:
    """The same with the `--datastore NAME=PATH` values checked and joined to their domains.

    Raises StartupError naming what is wrong; with `skip_broken`, a datastore that can't be used is left out with a warning.
    """
    datastores: dict[str, Datastore] = {}
    for name, path in (parse_named("--datastore", value) for value in values):
        if name not in models.domains.names:
            raise StartupError(f"--datastore {name}={path}: no --decoder is called {name!r}")
        if name in datastores:
            raise StartupError(f"--datastore: the name {name!r} is given twice")
        try:
            package = RetrievalPackage.open(Path(path).resolve(), models.base)
        except DecoderError as error:
            if not skip_broken:
                raise StartupError(f"--datastore {name}: {error} (--skip-broken-datastores serves without it)") from None
            print(f"memdec: warning: --datastore {name}: {error}; serving without it", file=sys.stderr, flush=True)
            continue
        datastores[name] = Datastore(str(package.path), package.lam, package.entries, package.size, package.revision)
    domains = tuple(replace(d, datastore=datastores.get(d.name)) for d in models.domains)
    return replace(models, domains=replace(models.domains, all=domains))


def with_ngrams(models: Models, values: Iterable[str]) -> Models:
    """The same with the `--ngram NAME=PATH` values checked, and joined to the domains of their names or made domains of their own.

    A folder of text is indexed first, or found in the cache. Raises StartupError naming what is wrong.
    """
    domains, given = models.domains, set[str]()
    for name, path in (parse_named("--ngram", value) for value in values):
        if name in given:
            raise StartupError(f"--ngram: the name {name!r} is given twice")
        given.add(name)
        tokenizer = load_tokenizer(models.base)
        token_hash = token_map_hash(tokenizer)
        try:
            package = open_or_index(Path(path).resolve(), tokenizer, cache_folder("ngrams"), name).path
            ngrams = open_ngrams(package, lambda: fingerprint_model(models.base), token_hash)
        except DecoderError as error:
            raise StartupError(f"--ngram {name}: {error}") from None
        domains = domains.having(with_memory(domains.get(name), name, ngrams, token_hash))
    return replace(models, domains=domains)


def cache_folder(kind: str) -> Path:
    """Where indexes of folders of text (`ngrams`), and complete decoders, are kept: `memdec/KIND` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memdec" / kind


def open_ngrams(path: Path, base: Callable[[], str], token_hash: str) -> Ngrams:
    """An n-gram memory, checked: `base` says the base's revision, `token_hash` is of its token map. Raises DecoderError, one line."""
    memory = NgramMemory.open(path)
    if memory.tokenizer != token_hash:
        raise PackageError(f"{path}: made with another tokenizer (token map {memory.tokenizer}, the base's is {token_hash})")
    fitted = memory.record.beside
    revision = base() if memory.base is not None or fitted else None
    beside = memory.base is not None and memory.base == revision
    return Ngrams(
        str(path), memory.lambda_, memory.order, memory.tokens, memory.size, memory.revision, memory.tuned and beside, memory.sources,
        dict(memory.perplexity) if beside else {}, tuple(memory.weights),
        tuple(both_of(one) for one in fitted if one.base == revision),
    )  # fmt: skip


def both_of(record: BesideRecord) -> Both:
    """What an n-gram package says of a decoder."""
    shares = tuple((decoder, ngram) for decoder, ngram in record.shares)
    return Both(record.decoder, record.lam, shares, record.better, dict(record.perplexity))


def with_memory(domain: Domain | None, name: str, ngrams: Ngrams, token_hash: str) -> Domain:
    """A domain with this n-gram memory; without a decoder if there was none before."""
    if domain is None or not domain.decoder:
        return Domain.of_ngrams(name, ngrams, token_hash)
    return replace(domain, ngrams=ngrams)


def _check(base: str, decoders: list[tuple[str, str]], served_name: str | None, hub: Mapping[str, object]) -> Models:
    folder, beside = resolve(base, hub), {name: value for name, value in hub.items() if name != "revision"}
    config = read_json(folder / CONFIG)
    architecture = checked(Config, config, folder / CONFIG).architectures[0]
    check_weights(folder)
    names = [name for name, _ in decoders]
    if len(set(names)) < len(names):
        raise StartupError(f"--decoder: the name {next(n for n in names if names.count(n) > 1)!r} is given twice")
    if sum(f.stat().st_size for f in folder.glob("*.safetensors")) <= SCANNED:
        scan(folder, quantised="quantization_config" in config)
    tokenizer = load_tokenizer(folder)
    token_hash = token_map_hash(tokenizer)
    opened = [
        (name, open_decoder(name, resolve(path, beside), folder, lambda: fingerprint_model(folder), tokenizer)) for name, path in decoders
    ]
    limits = [positions(folder), *(positions(package.path) for _, package in opened)]
    require_one_shape(opened)
    domains = tuple(domain_of(name, package, token_hash) for name, package in opened)
    known = [limit for limit in limits if limit is not None]
    label = served_name or (folder.name if Path(base).exists() else base)
    return Models(folder, architecture, Domains(label, domains), min(known, default=None))


def open_decoder(
    name: str,
    path: Path,
    base: Path,
    revision: Callable[[], str],
    tokenizer: PreTrainedTokenizerBase,
    within: Sequence[Path] = (),
    most: int | None = None,
) -> Package:
    """A decoder's folder, with everything checked that can be without the other decoders. Raises StartupError or DecoderError.

    A package that shares tensors with the base is completed in the cache. `revision` says the base's, `tokenizer` is the base's. `within`: each file must lie in one of these folders; empty: anywhere.
    `most`: largest size of its weights, in bytes.
    """
    package = Package.read(path, within, most)
    require_room(package, tokenizer, name)
    # A package records the hash of its own map; comparing the maps themselves also covers plain checkpoints.
    require_same_token_map(tokenizer, load_copied(package.path, within), f"decoder {name}")
    return completed(package, base, cache_folder("decoders"), within).beside(revision)


def domain_of(name: str, package: Package, token_hash: str) -> Domain:
    """What the server says of a checked decoder."""
    p = package
    return Domain(name, str(p.path), p.lam, p.tuned, p.revision, p.size, token_hash, p.perplexity)


def resolve(model: str, hub: Mapping[str, object]) -> Path:
    """A local folder as it is; anything else is a hub id and is fetched into the hub's cache."""
    if Path(model).is_dir():
        return Path(model).resolve()
    require_folder(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"], **hub))
    except Exception as error:  # the hub raises many kinds here
        raise StartupError(f"{model}: neither a folder nor a model that the hub gives ({first_line(error)})") from None


def positions(folder: Path) -> int | None:
    """Longest context of a model, from its config."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted()).get_text_config()
    except Exception as error:  # transformers raises many kinds here
        raise StartupError(f"{folder / CONFIG}: no configuration that transformers can read ({first_line(error)})") from None
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None


def require_one_shape(packages: list[tuple[str, Package]]) -> None:
    """All decoders share one tower's KV cache, so they need one architecture and shape. Raises StartupError naming two that differ."""
    if not packages:
        return
    first, reference = packages[0]
    for name, package in packages[1:]:
        for key in sorted(reference.config.keys() | package.config.keys()):
            ours, theirs = reference.config.get(key), package.config.get(key)
            if key not in NOT_SHAPE and ours != theirs:
                raise StartupError(
                    f"decoders {first} and {name} differ in {key}: {shown(ours)} and {shown(theirs)}; "
                    "the decoders of one server need one architecture and shape"
                )


def require_room(package: Package, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise StartupError if the decoder has fewer embeddings than the tokenizer has ids. More (padding) are fine."""
    rows, ids = package.config.get("vocab_size") or 0, max(tokenizer.get_vocab().values()) + 1
    if rows < ids:
        raise StartupError(f"decoder {name}: its vocab_size is {rows}, but the tokenizer has {ids} ids; wanted at least as many")
