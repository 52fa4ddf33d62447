"""Log-probabilities of the same held-out tokens under every method, for one domain and one base.

One artifact per pair: `scores.npz` (an array [tokens] per method), `general.npz` (the same on the general corpus) and `figures.json` (tuned
parameters, recall, bytes).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.decoders import knn_lm
from memdec.decoders.knn_lm import TAUS, tune
from memdec.decoders.manifest import Manifest, stage
from memdec.decoders.models import load_model
from memdec.decoders.perplexity import LAMBDAS, SCORED, WINDOW, Floats, best_lambda, label_logprobs, mix, perplexity, score, scored, windows
from memdec.decoders.reading.array_types import Ids
from memdec.decoders.reading.datastore import Datastore
from memdec.decoders.reading.passages import Passages
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.reading.weights import fingerprint_model, safetensors_header
from memdec.decoders.study.plan import Budget
from memdec.decoders.study.rag import CHOICES, rag_logprobs, tune_retrieval
from memdec.decoders.tokens import load_ends, load_tokens

METHODS = {
    "base": "base",
    "rag": "RAG (BM25)",
    "knn": "kNN-LM, own keys",
    "knn_teacher": "kNN-LM, the teacher's keys",
    "dapt": "DAPT",
    "lora": "LoRA",
    "control": "control: decoder on labels alone",
    "decoder": "memory decoder",
}
NEIGHBOURS = (16, 64, 256, 1024)
PROBED = 64  # index cells visited per query: more than in training, for recall
FRACTIONS = (1.0, 0.25, 0.0625, 0.015625)  # of the datastore's entries, for perplexity against size
CHECKED = 256  # queries whose neighbours are compared with an exhaustive search


@dataclass(frozen=True)
class Models:
    """The models and datastores that one row of the table compares."""

    base: Path
    dapt: Path | None
    lora: Path | None
    teacher: Path | None
    decoder: Path
    control: Path | None
    store: Path | None
    """The teacher's datastore. This, teacher and control are None for a finished decoder, whose build is gone."""
    own_store: Path | None
    """A datastore of the base's own keys, if there is one."""
    rag: bool = True
    """Whether RAG is scored."""

    def retrievers(self) -> Iterator[tuple[str, Path, Path]]:
        """Yield the available kNN-LMs: method, datastore, and the model that computed its keys."""
        for method, store, keyed in (("knn_teacher", self.store, self.teacher), ("knn", self.own_store, self.base)):
            if store is not None and keyed is not None:
                yield method, store, keyed

    def fingerprints(self) -> Manifest:
        """Fingerprints of all models, for a manifest."""
        names = ("base", "dapt", "lora", "teacher", "decoder", "control")
        folders = {name: getattr(self, name) for name in names}
        return {name: path and fingerprint_model(path) for name, path in folders.items()} | {
            "own_keys": self.own_store is not None,
            "rag": self.rag,
        }


@dataclass(frozen=True)
class Heldout:
    """Scored windows of one held-out split."""

    ids: Ids
    starts: list[int]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The scored tokens, [n]."""
        labels: NDArray[np.int64] = np.asarray(self.ids)[scored(self.starts)].astype(np.int64)
        return labels

    @classmethod
    def open(cls, tokens: Path, split: str, most: int) -> "Heldout":
        """At most `most` windows of a split."""
        ids = load_tokens(tokens, split)
        return cls(ids, windows(len(ids), most))


def grids() -> Manifest:
    """Every choice that scores are tuned over, for a manifest: scores made with other grids are stale."""
    knn = {"neighbours": NEIGHBOURS, "probed": PROBED, "fractions": FRACTIONS, "taus": TAUS, "lambdas": knn_lm.LAMBDAS}
    return {"knn": knn, "rag": CHOICES, "lambdas": LAMBDAS, "window": WINDOW, "scored": SCORED}


def write_scores(out: Path, tokens: Path, general: Path, models: Models, budget: Budget, manifest: Manifest) -> Path:
    """Tune every method on the validation split; score the test split and the general corpus with it."""
    with stage(out, manifest) as folder:
        if folder is None:
            return out
        valid, test = Heldout.open(tokens, "valid", budget.valid_windows), Heldout.open(tokens, "test", budget.test_windows)
        scores = Scores(models, {"valid": valid, "test": test, "general": Heldout.open(general, "test", budget.general_windows)})
        for method, store, keyed in models.retrievers():
            scores.add_knn(method, Datastore.open(store), keyed)
        scores.add_base()
        for method, tuned in (("dapt", models.dapt), ("lora", models.lora)):
            if tuned is not None:
                scores.add_tuned(method, tuned)
        for method, memory in (("decoder", models.decoder), ("control", models.control)):
            if memory is not None:
                scores.add_memory(method, memory)
        if models.rag:
            scores.add_rag(load_tokens(tokens, "train"), budget.rag_tuning_windows)
        scores.figures["bytes"]["base"] = weight_bytes(models.base)
        scores.write(folder, tokens)
    return out


class Scores:
    """Log-probabilities and figures of the methods that have been scored so far."""

    def __init__(self, models: Models, splits: dict[str, Heldout]) -> None:
        self.models, self.splits = models, splits
        self.rows: dict[str, dict[str, Floats]] = {name: {} for name in splits}
        """Split -> method -> log-probabilities of the split's scored tokens, [n]."""
        self.figures: dict[str, Any] = {"bytes": {}, "tuned": {}, "recall": {}, "store": {}}
        """Figure -> method -> its value."""

    def add_base(self) -> None:
        """Score the base, unless a kNN-LM has scored it already."""
        if "base" not in self.rows["valid"]:
            for name, logprobs in self._logprobs("base", self.models.base).items():
                self.rows[name]["base"] = logprobs

    def add_tuned(self, method: str, folder: Path) -> None:
        """Score a fine-tuned base, alone."""
        for name, logprobs in self._logprobs(method, folder).items():
            self.rows[name][method] = logprobs
        self.figures["bytes"][method] = weight_bytes(self.models.base)

    def add_memory(self, method: str, folder: Path) -> None:
        """Score a decoder's mixture with the base, its lambda tuned."""
        own = self._logprobs(method, folder)
        lam = best_lambda(self.rows["valid"]["base"], own["valid"])
        for name in self.splits:
            self.rows[name][method] = mix(self.rows[name]["base"], own[name], lam)
        self.figures["tuned"][method] = {"lambda": lam, "alone": round(perplexity(own["test"]), 3)}
        self.figures["bytes"][method] = weight_bytes(self.models.base) + weight_bytes(folder)

    def add_knn(self, method: str, store: Datastore, keyed: Path) -> None:
        """Score the kNN-LM beside the base, its queries embedded by the model at `keyed`; also the base, if it isn't scored yet."""
        model, most = load_model(keyed), min(max(NEIGHBOURS), len(store.keys))
        neighbours: dict[str, tuple[Any, Any, Any]] = {}
        for name, part in self.splits.items():
            logprobs, queries = score(model, part.ids, f"{method} {name}", part.starts, keys=True)
            if "base" not in self.rows[name]:
                own, base = keyed == self.models.base, self.models.base
                self.rows[name]["base"] = logprobs if own else label_logprobs(load_model(base), part.ids, f"base {name}", part.starts)
            distances, numbers = store.search(queries, most, PROBED)
            neighbours[name] = distances, numbers, store.values[numbers] == part.labels[:, None]
            if name == "test":
                self.figures["recall"][method] = _recall(store, queries[:CHECKED], numbers[:CHECKED])
        self._add_neighbours(method, store, neighbours, 0 if keyed == self.models.base else weight_bytes(keyed))

    def _add_neighbours(self, method: str, store: Datastore, neighbours: dict[str, tuple[Any, Any, Any]], extra: int) -> None:
        """Tune and score a kNN-LM: split -> distances, numbers and hits of its neighbours; `extra`: bytes of the model that embeds queries."""
        base = {name: np.exp(self.rows[name]["base"]) for name in self.splits}
        best = tune(neighbours["valid"][0], neighbours["valid"][2], base["valid"], NEIGHBOURS)
        for name, (distances, _, hits) in neighbours.items():
            self.rows[name][method] = best.logprobs(distances, hits, base[name])
        self.figures["tuned"][method] = {k: v for k, v in best.to_dict().items() if k != "tried"}
        per_entry = 2 * store.keys.shape[1] + store.values.dtype.itemsize + store.keys.shape[1] / 16 + 8
        size = int(len(store.keys) * per_entry)
        self.figures["bytes"][method] = weight_bytes(self.models.base) + extra + size
        smaller = list(_smaller_stores(neighbours, base, len(store.keys), per_entry))
        self.figures["store"][method] = {"entries": len(store.keys), "bytes": size, "smaller": smaller}

    def add_rag(self, train: Ids, most: int) -> None:
        """Tune RAG over the training text `train` [tokens] on at most `most` validation windows, then score it."""
        base, tokenizer, valid = load_model(self.models.base), load_tokenizer(self.models.base), self.splits["valid"]
        few = [valid.starts[i] for i in np.linspace(0, len(valid.starts) - 1, min(most, len(valid.starts))).astype(int)]
        how, tried = tune_retrieval(base, train, valid.ids, few, tokenizer)
        passages = Passages.build(train, tokenizer, how.passage)
        for name in ("test", "general"):
            part = self.splits[name]
            self.rows[name]["rag"] = rag_logprobs(base, passages, part.ids, part.starts, how, f"rag {name}")
        self.figures["tuned"]["rag"] = {**how.to_dict(), "tried": tried}
        self.figures["bytes"]["rag"] = weight_bytes(self.models.base) + passages.size

    def write(self, folder: Path, tokens: Path) -> None:
        """Write the artifact's files, and tokens.npz: label and document of each scored test token, and the training text's token counts."""
        for name, split in (("scores.npz", "test"), ("general.npz", "general")):
            scores: dict[str, Any] = dict(self.rows[split])
            np.savez(folder / name, **scores)
        ends, test = load_ends(tokens, "test"), self.splits["test"]
        counts = np.bincount(load_tokens(tokens, "train"), minlength=int(np.asarray(test.ids).max()) + 1)
        np.savez(folder / "tokens.npz", labels=test.labels, documents=np.searchsorted(ends, scored(test.starts), "right"), counts=counts)
        (folder / "figures.json").write_text(json.dumps(self.figures, indent=1) + "\n")

    def _logprobs(self, method: str, folder: Path) -> dict[str, Floats]:
        """Split -> a model's log-probabilities of its scored tokens, [n]."""
        model = load_model(folder)
        return {name: label_logprobs(model, part.ids, f"{method} {name}", part.starts) for name, part in self.splits.items()}


def _smaller_stores(neighbours: dict[str, Any], base: dict[str, Floats], entries: int, per_entry: float) -> Iterator[dict[str, float]]:
    """Perplexity with random parts of the datastore. A part's neighbours are the full datastore's neighbours that lie in it."""
    for fraction in FRACTIONS:
        kept = np.random.default_rng(0).random(entries) < fraction
        parts = {name: np.where(kept[numbers], distances, np.float32(3e38)) for name, (distances, numbers, _) in neighbours.items()}
        order = {name: np.argsort(parts[name], 1, kind="stable") for name in ("valid", "test")}
        near = {name: np.take_along_axis(parts[name], order[name], 1) for name in order}
        hits = {name: np.take_along_axis(neighbours[name][2], order[name], 1) for name in order}
        best = tune(near["valid"], hits["valid"], base["valid"], NEIGHBOURS)
        result = perplexity(best.logprobs(near["test"], hits["test"], base["test"]))
        yield {"entries": int(kept.sum()), "bytes": int(kept.sum() * per_entry), "perplexity": round(result, 3)}


def _recall(store: Datastore, queries: NDArray[np.float32], numbers: NDArray[np.int64], nearest: int = 64) -> float:
    """Share of the true nearest neighbours (by exhaustive search) that the index returned."""
    distances = np.zeros((len(queries), len(store.keys)), np.float32)
    for start in range(0, len(store.keys), 65_536):
        keys = np.asarray(store.keys[start : start + 65_536], np.float32)
        distances[:, start : start + len(keys)] = (keys**2).sum(1) - 2 * queries @ keys.T
    nearest = min(nearest, len(store.keys) - 1)
    true = np.argpartition(distances, nearest, 1)[:, :nearest]
    return round(float(np.mean([np.isin(t, n[:nearest]).mean() for t, n in zip(true, numbers, strict=True)])), 4)


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weights at two bytes per parameter, whatever dtype its files have."""
    headers = [safetensors_header(f)[1] for f in folder.glob("*.safetensors")]
    shapes = [entry["shape"] for header in headers for name, entry in header.items() if name != "__metadata__"]
    return 2 * sum(int(np.prod(shape)) for shape in shapes)
