"""`memdec build`: run the stages in order; a stage whose inputs have not changed is kept."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memdec.decoders import parallel
from memdec.decoders.corpus import Corpus
from memdec.decoders.datastore import PIECE, write_datastore
from memdec.decoders.decoder import write_control, write_decoder
from memdec.decoders.knn_targets import KEPT, KINDS, TUNED_ON, write_targets
from memdec.decoders.manifest import Manifest, alone, fingerprint, is_fresh, read_manifest, refuse_foreign
from memdec.decoders.models import load_model
from memdec.decoders.near_duplicates import Cleaned, write_near_duplicates
from memdec.decoders.package import write_package
from memdec.decoders.perplexity import measure, table
from memdec.decoders.pretrain import DECODER, Shape
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE
from memdec.decoders.reading.tokenizer import load_tokenizer, require_same_token_map, token_map_hash
from memdec.decoders.reading.weights import check_weights, fingerprint_model
from memdec.decoders.teacher import write_student, write_tuned
from memdec.decoders.tokens import load_tokens, write_tokens
from memdec.decoders.train import Schedule

LEAST_ENTRIES = 2_000  # more than the longest training window, 1,025 tokens with its last label


@dataclass(frozen=True)
class BuildOptions:
    """Every knob of a build. The field names are the flags."""

    teacher_tokens: int = field(default=1_000_000, metadata={"help": "tokens that tune the teacher on the domain"})
    entries: int = field(default=1_500_000, metadata={"help": "datastore entries at most"})
    neighbours: int = field(default=256, metadata={"help": "largest k tried: how many neighbours a kNN distribution is made of"})
    student_tokens: int = field(default=3_000_000, metadata={"help": "decoder training on the labels alone, tokens"})
    knn_tokens: int = field(default=1_500_000, metadata={"help": "decoder training on the kNN targets, tokens"})
    targets: str = field(
        default="knn-lm", metadata={"help": "what is imitated: knn-lm, neighbours and teacher mixed, or knn, the neighbours alone"}
    )
    beta: float = field(default=0.5, metadata={"help": "weight of the kNN term in the loss (paper, eq. 6)"})
    seed: int = field(default=0, metadata={"help": "seed of weights and order"})
    licence: str = field(default="not stated", metadata={"help": "licence of the corpus's text, recorded in the package"})

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and name != "seed" and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} {value}: wanted a whole number above 0")
        if self.entries < LEAST_ENTRIES:
            raise OptionError(f"--entries {self.entries}: wanted at least {LEAST_ENTRIES:,}")
        if self.seed < 0:
            raise OptionError(f"--seed {self.seed}: wanted a whole number, 0 or above")
        if not 0 <= self.beta <= 1:
            raise OptionError(f"--beta {self.beta}: wanted a number from 0 to 1")
        if self.targets not in KINDS:
            raise OptionError(f"--targets {self.targets}: wanted {' or '.join(KINDS)}")

    def teacher_schedule(self) -> Schedule:
        """Schedule of the teacher: small batches, because in a short training more steps help more than less noisy gradients."""
        return Schedule(self.teacher_tokens, batch=4, seed=self.seed, matrix_lr=0.01, other_lr=2e-3, stretched=0.0)

    def student_schedule(self) -> Schedule:
        """Schedule of the student: a short cooldown, because the second phase cools down again, for longer."""
        return Schedule(self.student_tokens, batch=4, seed=self.seed, cooldown=0.2)

    def knn_schedule(self) -> Schedule:
        """Schedule of the second phase: of the decoder, and of the control that is trained on the labels alone."""
        return Schedule(self.knn_tokens, batch=8, seed=self.seed + 1, cooldown=0.9)


@dataclass(frozen=True)
class Build:
    """The build of one domain's decoder: its inputs, its options and its folders."""

    domain: str
    corpus: Corpus
    base: Path
    """The base it is built for; its tokenizer is the decoder's."""
    out: Path
    """Where the package goes."""
    work: Path
    """Folder of the intermediate artifacts."""
    options: BuildOptions = BuildOptions()
    teacher: Path | None = None
    """Model from which the teacher is tuned; the base if None."""
    beside: tuple[Path, ...] = ()
    """Further bases for which lambda is tuned and perplexity measured."""
    shape: Shape = DECODER

    def check(self) -> None:
        """Raise OptionError or PackageError, one line, before anything is made."""
        if not DOMAIN.fullmatch(self.domain):
            raise OptionError(f"NAME {self.domain!r}: wanted {DOMAIN_RULE}")
        refuse_foreign(self.out)
        if self.work.exists() and not self.work.is_dir():
            raise OptionError(f"--work {self.work}: is not a folder")
        tokenizer = None
        models = {"--base": [self.base], "--teacher": [self.teacher] if self.teacher else [], "--beside": [*self.beside]}
        kept = [(flag, p) for flag, folders in models.items() for p in folders] + [("--work", self.work), ("--corpus", self.corpus.root)]
        for flag, path in kept:  # writing the package replaces all of --out
            if self.out.resolve() in (path.resolve(), *path.resolve().parents):
                raise OptionError(f"--out {self.out}: {flag} is in it and would be replaced; give a new folder")
        for flag, model in ((flag, model) for flag, folders in models.items() for model in folders):
            if not model.is_dir():
                raise OptionError(f"{flag} {model}: no such folder")
            check_weights(model)
            theirs = load_tokenizer(model)
            tokenizer = tokenizer or theirs
            require_same_token_map(tokenizer, theirs, f"{flag} {model}")

    def run(self, until: str = "package") -> Path:
        """Make every artifact up to stage `until`, reusing fresh ones; returns the folder of the last."""
        self.check()
        path = self.work
        with alone(self.work):
            for name, path in self.stages():  # noqa: B007
                if name == until:
                    break
        return path

    def stages(self) -> Iterator[tuple[str, Path]]:
        """Make one artifact after the other; yields (stage, folder)."""
        work, options, made = self.work, self.options, versions()
        tokenizer = load_tokenizer(self.base)
        if parallel.rank() == 0:
            print(f"corpus {self.corpus.name}: reading", flush=True)
        text = self.corpus.fingerprint()
        inputs: Manifest = {"corpus": text}
        cleaned = write_near_duplicates(work / "near_duplicates", self.corpus, inputs)
        yield "near-duplicates", cleaned

        inputs = {"cleaned": fingerprint(inputs), "token_map": token_map_hash(tokenizer)}
        tokens = write_tokens(work / "tokens", Cleaned.open(self.corpus, cleaned), tokenizer, inputs)
        yield "tokens", tokens

        tokenized, source = fingerprint(inputs), self.teacher or self.base
        tuning = options.teacher_schedule()
        inputs = {"tokens": tokenized, "base": fingerprint_model(source), "schedule": tuning.to_dict(), "versions": made}
        teacher = write_tuned(work / "teacher", tokens, source, tuning, inputs)
        yield "teacher", teacher

        inputs = {"teacher": fingerprint(inputs), "entries": options.entries, "pieces": PIECE}
        store = write_datastore(work / "datastore", tokens, teacher, options.entries, inputs)
        yield "datastore", store

        inputs = {
            "datastore": fingerprint(inputs),
            "neighbours": options.neighbours,
            "kind": options.targets,
            "kept": KEPT,
            "tuned_on": TUNED_ON,
        }
        targets = write_targets(work / "knn_targets", store, teacher, tokens, options.neighbours, options.targets, inputs)
        yield "knn-targets", targets

        imitated, first = fingerprint(inputs), options.student_schedule()
        inputs = {"tokens": tokenized, "shape": asdict(self.shape), "schedule": first.to_dict(), "versions": made}
        student = write_student(work / "student", tokens, self.base, self.shape, first, inputs)
        yield "student", student

        second = options.knn_schedule()
        inputs = {"targets": imitated, "student": fingerprint(inputs), "schedule": second.to_dict(), "beta": options.beta}
        decoder = write_decoder(work / "decoder", store, targets, student, second, options.beta, inputs)
        yield "decoder", decoder

        bases = [fingerprint_model(b) for b in (self.base, *self.beside)]
        inputs = {"decoder": fingerprint(inputs), "domain": self.domain, "bases": bases, "licence": options.licence}
        yield "package", self._package(decoder, tokens, text, inputs)

    def control(self, tokens: Path) -> Path:
        """Train the control beside the decoder; see `write_control`. Returns its folder."""
        schedule = self.options.knn_schedule()
        inputs = {"student": fingerprint(read_manifest(self.work / "student")["inputs"]), "schedule": schedule.to_dict()}
        return write_control(self.work / "control", tokens, self.work / "student", schedule, inputs)

    def _package(self, decoder: Path, tokens: Path, text: str, inputs: Manifest) -> Path:
        if is_fresh(self.out, inputs):
            if parallel.rank() == 0:
                print(f"{self.out.name}: fresh, kept", flush=True)
            return self.out
        bases, memory = {}, load_model(decoder)
        for base in (self.base, *self.beside):
            figures = measure(load_model(base), memory, load_tokens(tokens, "valid"), load_tokens(tokens, "test"))
            bases[fingerprint_model(base)] = {"name": base.resolve().name, **figures}
            if parallel.rank() == 0:
                print(table([{"domain": self.domain, "beside": base.resolve().name, **figures}]))
        made = ("near_duplicates", "tokens", "teacher", "datastore", "knn_targets", "student", "decoder")
        tuned = json.loads((self.work / "knn_targets" / "tuned.json").read_text())
        training = {
            "corpus": {"name": self.corpus.name, "fingerprint": text, "licence": self.options.licence},
            "options": {name: value for name, value in asdict(self.options).items() if name != "licence"},
            "tuned": {"k": tuned["neighbours"], "tau": tuned["tau"], "lambda": tuned["lam"]},  # of the kNN-LM that was imitated
            "seconds": {name: read_manifest(self.work / name)["seconds"] for name in made},
            "versions": versions(),
        }
        return write_package(self.out, decoder, self.domain, bases, training, inputs)


def versions() -> dict[str, Any]:
    """Versions of the libraries that change an artifact's bytes."""
    return {name: version(name) for name in ("torch", "transformers", "faiss-cpu")}
