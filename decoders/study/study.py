"""Run a study: train missing models, score every method, write the report. Artifacts whose inputs have not changed are kept."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memdec.decoders import parallel
from memdec.decoders.build import Build
from memdec.decoders.corpus import Corpus
from memdec.decoders.datastore import write_datastore
from memdec.decoders.manifest import Manifest, fingerprint, read_manifest, stage, write_whole
from memdec.decoders.models import load_model
from memdec.decoders.near_duplicates import Cleaned
from memdec.decoders.perplexity import perplexity
from memdec.decoders.reading.datastore import Datastore
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.passages import Passages, RagOptions
from memdec.decoders.reading.shared_tensors import completed
from memdec.decoders.reading.tokenizer import load_tokenizer, require_same_token_map, token_map_hash
from memdec.decoders.reading.weights import fingerprint_model
from memdec.decoders.study import latency
from memdec.decoders.study.continuations import continuations
from memdec.decoders.study.lora import write_lora
from memdec.decoders.study.plan import Domain, Plan
from memdec.decoders.study.report import write_report
from memdec.decoders.study.scores import Heldout, Models, grids, write_scores
from memdec.decoders.study.served import served_logprobs
from memdec.decoders.study.steps import Step, mixed, plain, rag, retrieved
from memdec.decoders.teacher import write_tuned
from memdec.decoders.tokens import load_tokens, write_tokens
from memdec.decoders.train import Schedule


@dataclass(frozen=True)
class Study:
    """Runs a plan."""

    plan: Plan

    def run(self, out: Path, server: str | None = None) -> None:
        """Run the study and write table.md, results.json and plots into `out`. `server`: URL of a server to compare with."""
        general = self._general()
        pairs, timed = [], {}
        for domain in self.plan.domains:
            build = self._build(domain)
            build.run("tokens" if domain.decoder else "decoder")
            for label in domain.bases or self.plan.bases:
                models = self._models(build, label, domain)
                scores = self._scores(build, label, models, general)
                pairs.append((domain.name, label, scores))
                if server:
                    self._through_server(server, build, models, scores)
                timed[domain.name, label] = self._latency(build, label, models, scores)
                self._continue(build, label, domain.prompts, models, scores)
        if parallel.rank() == 0:
            write_report(out, self.plan, pairs, timed)
            print(f"{out / 'table.md'}")

    @property
    def _first(self) -> Path:
        """Folder of the base that the decoders were built for."""
        return next(iter(self.plan.bases.values())).path

    def _build(self, domain: Domain) -> Build:
        options = replace(domain.options, no_ngram=not domain.options.ngram_targets)
        return Build(domain.name, Corpus.open(domain.corpus), self._first, domain.work / "package", domain.work, options)

    def _general(self) -> Path:
        corpus, tokenizer = Corpus.open(self.plan.general), load_tokenizer(self._first)
        inputs: Manifest = {"corpus": corpus.fingerprint(), "token_map": token_map_hash(tokenizer)}
        return write_tokens(self.plan.work / "general" / "tokens", Cleaned(corpus, frozenset()), tokenizer, inputs)

    def _models(self, build: Build, label: str, domain: Domain) -> Models:
        """The models of one domain and base; trains those that are missing."""
        work, budget, without = build.work, self.plan.bases[label], domain.without
        base, tokens = budget.path, work / "tokens"
        teacher, store, control = (None, None, None) if domain.decoder else (work / "teacher", work / "datastore", build.control(tokens))
        decoder = completed(Package.open(domain.decoder), self._first, work).path if domain.decoder else work / "decoder"
        require_same_token_map(load_tokenizer(base), load_tokenizer(decoder), str(decoder))
        source: Manifest = {"tokens": fingerprint(read_manifest(tokens)["inputs"]), "base": fingerprint_model(base)}

        dapt = lora = None
        if budget.dapt_tokens and "dapt" not in without:
            tuning = replace(build.options.teacher_schedule(), tokens=budget.dapt_tokens)
            if teacher is not None and base == self._first and tuning == build.options.teacher_schedule():
                dapt = teacher  # the build's teacher is this model
            else:
                dapt = write_tuned(work / f"dapt-{label}", tokens, base, tuning, source | {"schedule": tuning.to_dict()})
        if budget.lora_tokens and "lora" not in without:
            size = sum(p.numel() for p in load_model(decoder).parameters())
            adapting = Schedule(budget.lora_tokens, batch=4, seed=build.options.seed, other_lr=2e-3, stretched=0.0, cooldown=0.6)
            inputs = source | {"schedule": adapting.to_dict(), "parameters": size}
            lora = write_lora(work / f"lora-{label}", tokens, base, size, adapting, inputs)
        own_store = None
        if budget.own_keys and "knn" not in without:
            inputs = source | {"entries": build.options.entries}
            own_store = write_datastore(work / f"datastore-{label}", tokens, base, build.options.entries, inputs)
        return Models(base, dapt, lora, teacher, decoder, control, store, own_store, budget.rag and "rag" not in without)

    def _scores(self, build: Build, label: str, models: Models, general: Path) -> Path:
        inputs = {**models.fingerprints(), "budget": asdict(self.plan.budget), "general": read_manifest(general)["inputs"]}
        inputs["tokens"] = read_manifest(build.work / "tokens")["inputs"]
        # Only the datastores' own inputs count: build options like the licence change no score.
        inputs["made"] = {name: read_manifest(store)["inputs"] for name, store, _ in models.retrievers()}
        inputs["grids"] = grids()
        return write_scores(build.work / f"scores-{label}", build.work / "tokens", general, models, self.plan.budget, inputs)

    def _latency(self, build: Build, label: str, models: Models, scores: Path) -> dict[str, float]:
        """Milliseconds per token by method; kept as an artifact."""
        inputs = {"scores": fingerprint(read_manifest(scores)["inputs"]), "tokens": self.plan.budget.latency_tokens}
        out = build.work / f"latency-{label}"
        with stage(out, inputs) as folder:
            if folder is not None:
                tuned = json.loads((scores / "figures.json").read_text())["tuned"]
                milliseconds = self._milliseconds(build, models, tuned)
                (folder / "milliseconds.json").write_text(json.dumps(milliseconds, indent=1) + "\n")
        result: dict[str, float] = json.loads((out / "milliseconds.json").read_text())
        return result

    def _milliseconds(self, build: Build, models: Models, tuned: dict[str, Any]) -> dict[str, float]:
        base, memory = load_model(models.base), load_model(models.decoder)
        train, test = load_tokens(build.work / "tokens", "train"), load_tokens(build.work / "tokens", "test")
        methods: dict[str, Callable[[], Step]] = {
            "base": partial(plain, base),
            "decoder": partial(mixed, base, memory, tuned["decoder"]["lambda"]),
        }
        if models.rag:
            how = RagOptions(**{k: v for k, v in tuned["rag"].items() if k != "tried"})
            methods["rag"] = partial(rag, base, Passages.build(train, load_tokenizer(models.base), how.passage), how)
        for name, store, keyed in models.retrievers():
            best, encoder = tuned[name], None if keyed == models.base else load_model(keyed)
            methods[name] = partial(retrieved, base, Datastore.open(store), best["neighbours"], best["tau"], best["lam"], encoder)
        milliseconds = latency.milliseconds(methods, test, self.plan.budget.latency_tokens)
        return {**milliseconds, "control": milliseconds["decoder"], "dapt": milliseconds["base"], "lora": milliseconds["base"]}

    def _continue(self, build: Build, label: str, prompts: tuple[str, ...], models: Models, scores: Path) -> None:
        """Sample continuations of the prompts; kept as an artifact."""
        inputs = {"scores": fingerprint(read_manifest(scores)["inputs"]), "prompts": prompts}
        with stage(build.work / f"continuations-{label}", inputs) as folder:
            if folder is not None:
                tuned = json.loads((scores / "figures.json").read_text())["tuned"]
                texts = continuations(models, tuned, load_tokenizer(models.base), prompts)
                write_whole(folder / "continuations.json", json.dumps(texts, indent=1, ensure_ascii=False) + "\n")

    def _through_server(self, server: str, build: Build, models: Models, scores: Path) -> None:
        """Compare offline perplexities of base and mixture with a running server's; writes served.json into the scores' folder."""
        part = Heldout.open(build.work / "tokens", "test", self.plan.budget.test_windows)
        lam = json.loads((scores / "figures.json").read_text())["tuned"]["decoder"]["lambda"]
        served = served_logprobs(server, part, models.base, build.domain, lam)
        if served is None:
            return
        rows = np.load(scores / "scores.npz")
        kept = served["kept"]
        figures = {
            method: {"offline": perplexity(rows[method][kept]), "served": perplexity(served[method]), "lambda": lam}
            for method in ("base", "decoder")
        }
        (scores / "served.json").write_text(json.dumps(figures, indent=1) + "\n")


def run_from_file(file: Path, out: Path, server: str | None = None) -> None:
    """`memdec evaluate FILE --out OUT`."""
    Study(Plan.load(file)).run(out, server)
