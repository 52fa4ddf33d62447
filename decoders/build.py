"""`memdec build`: run the stages in order; a stage whose inputs have not changed is kept."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memdec.decoders import parallel
from memdec.decoders.base_labels import write_base_labels
from memdec.decoders.build_options import ONLY_INIT, BuildOptions
from memdec.decoders.corpus import Corpus
from memdec.decoders.curve import VALIDATED, Curve, write_validation
from memdec.decoders.datastore import PIECE, write_datastore
from memdec.decoders.decoder import Run, write_control, write_decoder, write_mixed
from memdec.decoders.knn_targets import KEPT, TUNED_ON, Kind, write_targets
from memdec.decoders.manifest import Manifest, alone, fingerprint, is_fresh, read_manifest, refuse_foreign
from memdec.decoders.models import load_model
from memdec.decoders.near_duplicates import Cleaned, write_near_duplicates
from memdec.decoders.ngram_package import NgramOptions, NgramPackage, refuse_updated
from memdec.decoders.package import write_package
from memdec.decoders.perplexity import measure, table
from memdec.decoders.pretrain import DECODER, Shape
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE
from memdec.decoders.reading.tokenizer import end_of_document, load_tokenizer, require_same_token_map, token_map_hash
from memdec.decoders.reading.weights import check_weights, fingerprint_model
from memdec.decoders.start import Start, chosen_layers, layers_of
from memdec.decoders.teacher import write_student, write_tuned
from memdec.decoders.tokens import load_tokens, write_tokens

DEFAULTS = BuildOptions()
TOKENS_ALONE = BuildOptions(no_ngram=True)  # of a build that stops after its tokens
NOT_THE_DECODERS = ("licence", "no_ngram", "with_sources")  # options that change nothing in the decoder


@dataclass(frozen=True)
class Build:
    """The build of one domain's decoder: its inputs, its options and its folders."""

    domain: str
    corpus: Corpus
    base: Path
    """The base that the decoder is built for, whose tokenizer it shares."""
    out: Path
    """Folder that the decoder's package is written to; the n-gram memory's is `ngrams`."""
    work: Path
    """Folder of the intermediate artifacts."""
    options: BuildOptions = DEFAULTS
    teacher: Path | None = None
    """Model from which the teacher is tuned; the base if None."""
    beside: tuple[Path, ...] = ()
    """Further bases for which lambda is tuned and perplexity measured."""
    shape: Shape = DECODER
    init: Path | None = None
    """Pretrained model that the student starts from; None: fresh weights of `shape`."""

    @property
    def ngrams(self) -> Path:
        """Where the n-gram memory's package goes: beside the decoder's, of which it is no part."""
        return self.out.with_name(f"{self.out.name}.ngram")

    def check(self) -> None:
        """Raise OptionError or PackageError, one line, before anything is made."""
        if not DOMAIN.fullmatch(self.domain):
            raise OptionError(f"NAME {self.domain!r}: wanted {DOMAIN_RULE}")
        outs = (self.out,) if self.options.no_ngram else (self.out, self.ngrams)
        for out in outs:
            refuse_foreign(out)
        if not self.options.no_ngram:
            refuse_updated(self.ngrams)
        if self.work.exists() and not self.work.is_dir():
            raise OptionError(f"--work {self.work}: is not a folder")
        if self.init is None:
            self.options.refuse(ONLY_INIT, "the decoder has fresh weights without --init")
        if self.options.loss != "knn" and self.teacher is not None:
            raise OptionError(f"--teacher {self.teacher}: would have no effect; --loss {self.options.loss} has no datastore")
        tokenizer = None
        single = {"--init": self.init, "--teacher": self.teacher}
        models = {"--base": [self.base], "--beside": [*self.beside], **{flag: [path] for flag, path in single.items() if path}}
        kept = [(flag, p) for flag, folders in models.items() for p in folders] + [("--work", self.work), ("--corpus", self.corpus.root)]
        for out, (flag, path) in product(outs, kept):  # writing a package replaces all of its folder
            if out.resolve() in (path.resolve(), *path.resolve().parents):
                raise OptionError(f"--out {out}: {flag} is in it and would be replaced; give a new folder")
        for flag, model in ((flag, model) for flag, folders in models.items() for model in folders):
            if not model.is_dir():
                raise OptionError(f"{flag} {model}: no such folder")
            check_weights(model)
            theirs = load_tokenizer(model)
            tokenizer = tokenizer or theirs
            require_same_token_map(tokenizer, theirs, f"{flag} {model}")
        if self.init is not None:
            chosen_layers(self.options.init_layers, layers_of(self.init))

    def run(self, until: str = "package") -> Path:
        """Make every artifact up to stage `until`, reusing fresh ones; returns the folder of the last."""
        self.check()
        if until in ("teacher", "datastore", "knn-targets") and self.options.loss != "knn":
            raise OptionError(f"--loss {self.options.loss}: a build with it has no stage {until}")
        path = self.work
        with alone(self.work):
            for name, path in self.stages():  # noqa: B007
                if name == until:
                    break
        return path

    def stages(self) -> Iterator[tuple[str, Path]]:
        """Make one artifact after the other; yields (stage, folder)."""
        work, tokenizer = self.work, load_tokenizer(self.base)
        if parallel.rank() == 0:
            print(f"corpus {self.corpus.name}: reading", flush=True)
        text = self.corpus.fingerprint()
        inputs: Manifest = {"corpus": text}
        cleaned = write_near_duplicates(work / "near_duplicates", self.corpus, inputs)
        yield "near-duplicates", cleaned

        inputs = {"cleaned": fingerprint(inputs), "token_map": token_map_hash(tokenizer), **_other_end(tokenizer)}
        tokens = write_tokens(work / "tokens", Cleaned.open(self.corpus, cleaned), tokenizer, inputs)
        yield "tokens", tokens

        if not self.options.no_ngram:
            ngram = NgramOptions(self.options.with_sources, licence=self.options.licence)
            yield "ngram", NgramPackage(self.domain, self.corpus, self.base, self.ngrams, cleaned, ngram).write(tokens)

        tokenized, decoder = fingerprint(inputs), work / "decoder"
        for name, path, made in self._retrieverless(tokens, tokenized) if self.options.loss != "knn" else self._imitated(tokens, tokenized):
            inputs = made
            yield name, path
        bases = [fingerprint_model(b) for b in (self.base, *self.beside)]
        inputs = {"decoder": fingerprint(inputs), "domain": self.domain, "bases": bases, "licence": self.options.licence}
        yield "package", self._package(decoder, tokens, text, inputs)

    def _imitated(self, tokens: Path, tokenized: str) -> Iterator[tuple[str, Path, Manifest]]:
        """The stages of a decoder that imitates a retriever, each with its inputs."""
        work, options, source = self.work, self.options, self.teacher or self.base
        tuning = options.teacher_schedule()
        inputs: Manifest = {"tokens": tokenized, "base": fingerprint_model(source), "schedule": tuning.to_dict(), "versions": versions()}
        teacher = write_tuned(work / "teacher", tokens, source, tuning, inputs) if options.teacher_tokens else source
        yield "teacher", teacher, inputs

        inputs = {"teacher": fingerprint(inputs), "entries": options.entries, "pieces": PIECE}
        store = write_datastore(work / "datastore", tokens, teacher, options.entries, inputs)
        yield "datastore", store, inputs

        inputs = {
            "datastore": fingerprint(inputs),
            "neighbours": options.neighbours,
            "kind": options.targets,
            "kept": KEPT,
            "tuned_on": TUNED_ON,
        }
        if options.ngram_targets:
            inputs["ngrams"] = {"weight": options.ngram_targets, "memory": fingerprint(read_manifest(self.ngrams)["inputs"])}
        kind = Kind(options.targets, options.neighbours, self.ngrams, options.ngram_targets)
        targets = write_targets(work / "knn_targets", store, teacher, tokens, kind, inputs)
        yield "knn-targets", targets, inputs

        imitated = fingerprint(inputs)
        student, inputs = self._student(tokens, tokenized)
        yield "student", student, inputs

        run = self._second(student, tokens, tokenized)
        inputs = {"targets": imitated, "student": fingerprint(inputs), "schedule": run.schedule.to_dict(), "beta": options.beta}
        yield "decoder", write_decoder(work / "decoder", store, targets, run, options.beta, inputs), inputs

    def _retrieverless(self, tokens: Path, tokenized: str) -> Iterator[tuple[str, Path, Manifest]]:
        """The stages of a decoder that is trained on labels, or for the mixture with the base, each with its inputs."""
        work, options = self.work, self.options
        student, started = self._student(tokens, tokenized)
        yield "student", student, started

        if options.loss == "labels":
            run = self._second(student, tokens, tokenized)
            inputs: Manifest = {"student": fingerprint(started), "schedule": run.schedule.to_dict()}
            yield "decoder", write_control(work / "decoder", tokens, run, inputs), inputs
            return
        inputs = {"tokens": tokenized, "base": fingerprint_model(self.base), "entries": options.entries, "versions": versions()}
        labels = write_base_labels(work / "base_labels", tokens, self.base, options.entries, inputs)
        yield "base-labels", labels, inputs

        run = self._second(student, tokens, tokenized)
        inputs = {"labels": fingerprint(inputs), "student": fingerprint(started), "schedule": run.schedule.to_dict()}
        inputs["lambda"] = options.mixture_lambda
        yield "decoder", write_mixed(work / "decoder", labels, options.mixture_lambda, run, inputs), inputs

    def _student(self, tokens: Path, tokenized: str) -> tuple[Path, Manifest]:
        """Make the student: from a pretrained model's layers, or with fresh weights. Returns its folder and its inputs."""
        options, out = self.options, self.work / "student"
        schedule = options.student_schedule(self.init is not None)
        inputs: Manifest = {"tokens": tokenized, "schedule": schedule.to_dict(), "versions": versions()}
        if self.init is None:
            inputs["shape"] = asdict(self.shape)
            return write_student(out, tokens, self.base, self.shape, schedule, inputs, self._curve(tokens, tokenized)), inputs
        inputs |= {"init": fingerprint_model(self.init), "layers": options.init_layers, "base": fingerprint_model(self.base)}
        inputs["min_count"] = options.min_count
        start = Start(self.init, options.init_layers, self.base, options.min_count)
        return start.write(out, tokens, schedule, inputs, self._curve(tokens, tokenized)), inputs

    def _second(self, student: Path, tokens: Path, tokenized: str) -> Run:
        """Settings of the second phase of training."""
        frozen = self.base if self.init is not None else None
        return Run(student, self.options.knn_schedule(self.init is not None), frozen, self._curve(tokens, tokenized))

    def _curve(self, tokens: Path, tokenized: str) -> Curve | None:
        """The learning curve that trainings record; None unless --validate-every asks for one."""
        if not self.options.validate_every:
            return None
        inputs: Manifest = {"tokens": tokenized, "base": fingerprint_model(self.base), "windows": VALIDATED}
        return Curve.open(write_validation(self.work / "validation", tokens, self.base, inputs), tokens, self.options.validate_every)

    def control(self, tokens: Path) -> Path:
        """Train the control beside the decoder; see `write_control`. Returns its folder."""
        schedule = self.options.knn_schedule(self.init is not None)
        inputs = {"student": fingerprint(read_manifest(self.work / "student")["inputs"]), "schedule": schedule.to_dict()}
        run = Run(self.work / "student", schedule, self.base if self.init is not None else None)
        return write_control(self.work / "control", tokens, run, inputs)

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
        seconds = {name: read_manifest(self.work / name)["seconds"] for name in self._made()}
        training = {
            "corpus": {"name": self.corpus.name, "fingerprint": text, "licence": self.options.licence},
            "options": {name: value for name, value in asdict(self.options).items() if name not in NOT_THE_DECODERS},
            "seconds": seconds,
            "versions": versions(),
        }
        if self.options.loss == "knn":
            tuned = json.loads((self.work / "knn_targets" / "tuned.json").read_text())  # of the kNN-LM that was imitated
            training["tuned"] = {"k": tuned["neighbours"], "tau": tuned["tau"], "lambda": tuned["lam"]}
        if self.init is not None:
            training["init"] = {"name": self.init.resolve().name, "revision": fingerprint_model(self.init)}
        return write_package(self.out, decoder, self.domain, bases, training, self.base, inputs)

    def _made(self) -> tuple[str, ...]:
        """The folders of the stages before the package."""
        retriever = ("teacher", "datastore", "knn_targets") if self.options.teacher_tokens else ("datastore", "knn_targets")
        between = {"knn": (*retriever, "student"), "mixture": ("student", "base_labels"), "labels": ("student",)}[self.options.loss]
        return ("near_duplicates", "tokens", *between, "decoder")


def _other_end(tokenizer: PreTrainedTokenizerBase) -> Manifest:
    """The id that ends a document, for the manifest of the tokens; {} where it is the tokenizer's own end token."""
    end = end_of_document(tokenizer)
    return {} if end == tokenizer.eos_token_id else {"end": end}


def versions() -> dict[str, Any]:
    """Versions of the libraries that change an artifact's bytes."""
    return {name: version(name) for name in ("torch", "transformers", "faiss-cpu")}
