"""An n-gram memory's package: tokens -> suffix arrays -> tuned beside the base -> the folder (see memdec.decoders.reading.ngram).

The train split is what is remembered; order and lambda are tuned on valid, and perplexities measured on test, as a decoder's are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.decoders import parallel
from memdec.decoders.corpus import Corpus
from memdec.decoders.manifest import Manifest, fingerprint, read_manifest, stage
from memdec.decoders.models import load_model
from memdec.decoders.near_duplicates import Cleaned
from memdec.decoders.perplexity import Floats, label_logprobs, mix, perplexity, scored, windows
from memdec.decoders.reading.errors import ManifestError, OptionError
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.ngram_folder import SHARD_TOKENS, by_length, vocabulary_of
from memdec.decoders.reading.ngram_index import Text, cut, write_memory, write_record
from memdec.decoders.reading.ngram_record import LONGEST_ORDER, NAME
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.reading.weights import fingerprint_model
from memdec.decoders.tokens import load_ends, load_tokens

ORDERS = range(2, LONGEST_ORDER + 1)
LAMBDAS = tuple(round(0.01 * i, 2) for i in range(100))
TOLERATED = 0.001  # nats per token that a shorter order may cost: it is looked up faster
ENOUGH = 100  # tokens with one length of match that are enough to tune its lambda on
CARD = "README.md"
BESIDE = ("base", "decoder", "ngram", "both")  # what is measured beside a decoder


@dataclass(frozen=True)
class NgramOptions:
    """Options of `memdec ngram`; the field names are the flags."""

    with_sources: bool = field(default=False, metadata={"help": "let answers name the documents that a continuation comes from"})
    windows: int = field(
        default=32,
        metadata={"help": "windows of valid that tune order and lambda, and of test that are measured; 256 tokens are scored in each"},
    )
    licence: str = field(default="not stated", metadata={"help": "licence of the corpus's text, recorded in the package"})

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise OptionError(f"--windows {self.windows}: wanted a whole number above 0")


DEFAULTS = NgramOptions()


@dataclass(frozen=True)
class Tuned:
    """What was tuned and measured beside the base."""

    order: int
    lambdas: list[float]
    """Lambda for a longest match of 1, 2, … tokens."""
    perplexity: dict[str, float]


@dataclass(frozen=True)
class NgramPackage:
    """Writes the n-gram memory of one domain from the tokens of a build, for `memdec ngram` and for `memdec build`."""

    domain: str
    corpus: Corpus
    base: Path
    out: Path
    """Folder that the package is written to."""
    cleaned: Path
    """Folder that says which documents are left out."""
    options: NgramOptions = DEFAULTS

    def write(self, tokens: Path) -> Path:
        """Write the package of the tokens in a folder, unless it is there already. Raises DecoderError, one line."""
        vocabulary, made_from = vocabulary_of(load_tokenizer(self.base)), fingerprint(read_manifest(tokens)["inputs"])
        inputs: Manifest = {"tokens": made_from, "base": fingerprint_model(self.base), "domain": self.domain, **asdict(self.options)}
        with stage(self.out, inputs) as folder:
            if folder is None or parallel.rank() != 0:
                return self.out
            write_memory(folder, self.domain, self._texts(tokens), vocabulary)
            tuned = tune(NgramMemory.open(folder), self.base, tokens, self.options.windows)
            record = {
                "order": tuned.order, **by_length(tuned.lambdas), "tuned": True, "sources": self.options.with_sources, "base": inputs["base"],
                "perplexity": tuned.perplexity, "training": self._training(inputs),
            }  # fmt: skip
            write_record(folder, self.domain, vocabulary, **record)
            (folder / CARD).write_text(model_card(json.loads((folder / NAME).read_text())))
        return self.out

    def _texts(self, tokens: Path) -> Iterator[Text]:
        """The train split as shards, cut between documents."""
        ids, ends = load_tokens(tokens, "train"), load_ends(tokens, "train")
        names = [document.name for document in Cleaned.open(self.corpus, self.cleaned).named("train")]
        if len(names) != len(ends):
            raise ManifestError(f"{self.corpus.root}: has {len(names):,} documents, {tokens} is of {len(ends):,}; it changed meanwhile")
        return cut(Text(ids, ends, names), SHARD_TOKENS)

    def _training(self, inputs: Manifest) -> dict[str, Any]:
        corpus = {"name": self.corpus.name, "tokens": inputs["tokens"], "licence": self.options.licence}
        return {"corpus": corpus, "base": self.base.resolve().name, "windows": self.options.windows}


def refuse_updated(out: Path) -> None:
    """Raise OptionError if documents were added to a package or removed from it: a new build would lose that without a word."""
    if (out / NAME).is_file() and NgramMemory.read_record(out).training.get("updates"):
        raise OptionError(
            f"{out}: documents were added or removed there since it was built, and would be lost; move it, or give a new --out"
        )


def tune(memory: NgramMemory, base: Path, tokens: Path, most: int) -> Tuned:
    """Tune order and lambda on at most `most` windows of valid, and measure the mixture on as many of test, all beside the base."""
    model = load_model(base)
    valid, starts, ours = split_scores(model, tokens, "valid", most)
    scores = score_by_order(memory, valid, scored(starts), np.exp(ours))
    fitted = {order: fit(ours, scores, order) for order in ORDERS}
    lowest = min(figure for figure, _ in fitted.values())
    order = next(order for order, (figure, _) in fitted.items() if np.log(figure / lowest) <= TOLERATED)
    figure, lambdas = fitted[order]
    test, starts, theirs = split_scores(model, tokens, "test", most)
    measured = mixed_by_length(theirs, score_by_order(memory, test, scored(starts), np.exp(theirs)), order, lambdas)
    figures = {
        "valid base": perplexity(ours),
        "valid mixture": figure,
        "test base": perplexity(theirs),
        "test mixture": perplexity(measured),
    }
    return Tuned(order, lambdas, {name: round(value, 3) for name, value in figures.items()})


def fit(base: Floats, scores: "Scores", order: int) -> tuple[float, list[float]]:
    """The perplexity of the mixture, and lambda for a longest match of 1, 2, … tokens: that of all lengths where there are few tokens."""
    ours, lengths = np.log(scores.probabilities[order - ORDERS[0]]), np.minimum(scores.matched, order - 1)
    whole = min(LAMBDAS, key=lambda lam: perplexity(mix(base, ours, lam)))
    lambdas = []
    for length in range(1, LONGEST_ORDER):
        own = lengths == length
        lambdas.append(min(LAMBDAS, key=lambda lam: perplexity(mix(base[own], ours[own], lam))) if own.sum() >= ENOUGH else whole)
    return perplexity(mixed_by_length(base, scores, order, lambdas)), lambdas


def mixed_by_length(base: Floats, scores: "Scores", order: int, lambdas: Sequence[float]) -> Floats:
    """Log-probabilities of the mixture whose lambda is that of the longest match."""
    lam = np.array([0.0, *lambdas])[np.minimum(scores.matched, order - 1)]
    mixed: Floats = np.log((1 - lam) * np.exp(base) + lam * scores.probabilities[order - ORDERS[0]])
    return mixed


def split_scores(model: Any, tokens: Path, split: str, most: int) -> tuple[Sequence[int], list[int], Floats]:
    """A split's token ids, its windows, and the base's log-probabilities of their scored tokens."""
    ids = load_tokens(tokens, split)
    starts = windows(len(ids), most)
    return np.asarray(ids).tolist(), starts, label_logprobs(model, ids, f"{split} base", starts)


@dataclass(frozen=True)
class Scores:
    """What a memory, its weights left out, says of tokens."""

    probabilities: NDArray[np.float64]
    """p_ngram for every order of ORDERS, [orders, tokens]."""
    matched: NDArray[np.int64]
    """Length of the longest match for the longest order, [tokens]."""


def score_by_order(memory: NgramMemory, ids: Sequence[int], positions: NDArray[np.int64], base: Floats) -> Scores:
    """Score the tokens at `positions` of `ids`, of which the base says `base` [positions].

    At least as many tokens as the longest context has must be before each position.
    """
    result = np.repeat(base[None, :], len(ORDERS), 0).astype(np.float64)
    matched, longest = np.zeros(len(positions), np.int64), ORDERS[-1] - 1
    for at, position in enumerate(positions.tolist()):
        p, label = float(base[at]), ids[position]
        for length, after, counts in memory.levels(memory.tail(ids[position - longest : position], longest)):
            place = int(np.searchsorted(after, label))
            count = int(counts[place]) if place < len(after) and after[place] == label else 0
            discount, total = memory.discounts[length - 1], int(counts.sum())
            p = (max(count - discount, 0.0) + discount * len(after) * p) / total
            result[length - 1 :, at], matched[at] = p, length
    return Scores(result, matched)


def model_card(record: dict[str, Any]) -> str:
    """Text of a package's README.md: how to serve it, what was measured, what it was made from."""
    made = record["training"]
    figures = record.get("perplexity") or made["measured before updates"]
    rows = [f"| {split} | {figures[f'{split} base']} | **{figures[f'{split} mixture']}** |" for split in ("valid", "test")]
    updates = [f"Changed since it was measured: {', then '.join(made['updates'])}.", ""] if "updates" in made else []
    corpus = made["corpus"]
    return "\n".join(
        [
            "---", "tags: [n-gram-memory]", "license: other", f"license_name: {json.dumps(corpus['licence'])}", "---", "",
            f"# {record['domain']}: an n-gram memory", "",
            f"Exact counts of {record['tokens']:,} tokens' n-grams, to be mixed into a base model with the same tokenizer "
            f"(token map `{record['token_map']}`). It holds the text itself, as token ids: whoever has the package can read it.", "",
            "## Measured", "",
            f"Perplexity beside `{made['base']}`; order {record['order']} and λ (at most {record['lambda']}, less after "
            f"short matches) tuned on valid; "
            f"at most {made['windows']} windows of 512 tokens, the second half of each scored.", "",
            "| split | base alone | mixture |", "|---|---|---|", *rows, "", *updates, *_beside_decoders(record.get("beside", [])),
            "## Made from", "",
            f"Corpus `{corpus['name']}`, licence of its text: {corpus['licence']}.", "",
        ]
    )  # fmt: skip


def _beside_decoders(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The card's lines on what was measured beside decoders."""
    rows = []
    for entry in entries:
        figures = " | ".join(str(entry.get("perplexity", {}).get(name, "")) for name in BESIDE)
        rows.append(f"| {entry['decoder']} | {figures} | {'both' if entry['better'] else 'decoder'} |")
    head = [f"| decoder | {' | '.join(BESIDE)} | default |", f"|---{'|---' * len(BESIDE)}|---|"]
    return ["Beside decoders, on the half of valid that nothing was fitted on:", "", *head, *rows, ""] if rows else []
