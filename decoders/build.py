"""`memdec build`: the six stages, one after the other, each kept while what it was made from stays the same."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from decoders.corpus import Corpus
from decoders.datastore import write_datastore
from decoders.decoder import write_decoder
from decoders.errors import OptionError
from decoders.evaluate import measure, table
from decoders.knn_targets import write_targets
from decoders.manifest import fingerprint, is_fresh, read_manifest
from decoders.models import load_model
from decoders.package import DOMAIN, DOMAIN_RULE, Package, check_weights, fingerprint_model, write_package
from decoders.pretrain import DECODER, Shape
from decoders.tokenizer import load_tokenizer, token_map_hash
from decoders.tokens import load_tokens, write_tokens
from decoders.train import Schedule


@dataclass(frozen=True)
class BuildOptions:
    """Every knob of a build. The field names are the flags."""

    teacher_tokens: int = field(default=800_000, metadata={"help": "tokens that tune the teacher on the domain"})
    entries: int = field(default=1_500_000, metadata={"help": "datastore entries at most"})
    neighbours: int = field(default=64, metadata={"help": "k: neighbours a kNN distribution is made of"})
    text_tokens: int = field(default=3_000_000, metadata={"help": "decoder training on the labels alone, tokens"})
    knn_tokens: int = field(default=3_000_000, metadata={"help": "decoder training on the kNN targets, tokens"})
    beta: float = field(default=0.5, metadata={"help": "weight of the kNN term in the loss (paper, eq. 6)"})
    seed: int = field(default=0, metadata={"help": "seed of weights and order"})
    licence: str = field(default="not stated", metadata={"help": "licence of the corpus's text, recorded in the package"})

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("beta", "seed", "licence") and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} {value}: wanted a whole number above 0")
        if not 0 <= self.beta <= 1:
            raise OptionError(f"--beta {self.beta}: wanted a number from 0 to 1")


def build(domain: str, corpus: Corpus, base: Path, out: Path, work: Path, options: BuildOptions, shape: Shape = DECODER) -> Package:
    """Make a memory decoder for `domain` beside `base`; the package goes to `out`, everything else stays in `work`."""
    if not DOMAIN.fullmatch(domain):
        raise OptionError(f"NAME {domain!r}: wanted {DOMAIN_RULE}")
    if not base.is_dir():
        raise OptionError(f"--base {base}: no such folder")
    check_weights(base)
    tokenizer = load_tokenizer(base)
    made = {name: version(name) for name in ("torch", "transformers", "faiss-cpu")}
    # Small batches: these trainings are short, and a step taken early is worth more than its gradient's precision.
    teacher = Schedule(options.teacher_tokens, batch=4, seed=options.seed, matrix_lr=0.01, other_lr=2e-3, stretched=0.0)
    first = Schedule(options.text_tokens, batch=4, seed=options.seed, cooldown=0.2)
    second = Schedule(options.knn_tokens, batch=8, seed=options.seed + 1, cooldown=0.9)

    print(f"corpus {corpus.name}: reading", flush=True)
    text = corpus.fingerprint()
    inputs: dict[str, Any] = {"corpus": text, "token_map": token_map_hash(tokenizer)}
    tokens = write_tokens(work / "tokens", corpus, tokenizer, inputs)
    inputs |= {"base": fingerprint_model(base), "teacher": teacher.to_dict(), "entries": options.entries, "versions": made}
    store = write_datastore(work / "datastore", tokens, base, teacher, options.entries, inputs)
    inputs = {"datastore": fingerprint(inputs), "neighbours": options.neighbours}
    targets = write_targets(work / "knn_targets", store, tokens, options.neighbours, inputs)
    inputs = {
        "targets": fingerprint(inputs),
        "first": first.to_dict(),
        "second": second.to_dict(),
        "beta": options.beta,
        "shape": asdict(shape),
    }
    decoder = write_decoder(work / "decoder", tokens, targets, base, shape, first, second, options.beta, inputs)

    inputs = {"decoder": fingerprint(inputs), "domain": domain, "base": fingerprint_model(base), "licence": options.licence}
    if is_fresh(out, inputs):
        print(f"{out.name}: fresh, kept", flush=True)
        return Package.open(out, base)
    figures = measure(load_model(base), load_model(decoder), load_tokens(tokens, "valid"), load_tokens(tokens, "test"))
    provenance = {
        "corpus": {"name": corpus.name, "fingerprint": text, "licence": options.licence},
        "options": {name: value for name, value in asdict(options).items() if name != "licence"},
        "seconds": {d.name: read_manifest(d)["seconds"] for d in (tokens, store, targets, decoder)},
        "versions": made,
    }
    write_package(out, decoder, base, domain, figures, provenance, inputs)
    print(table([{"domain": domain, **figures}]))
    return Package.open(out, base)
