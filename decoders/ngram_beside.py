"""`memdec ngram --beside`: how an n-gram memory and a decoder go together beside a base, measured on text that both have never seen.

    p = (1 - lambda_d - lambda_n) * p_base + lambda_d * p_mem + lambda_n * p_ngram

The weights are fitted on every second window of valid, fixed and by length of the longest match; the other windows decide between these,
and whether they are better than each memory alone, which was fitted in the same way. What is fitted is written into the n-gram package, for
exactly this decoder and this base. Nothing else in the package changes.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.decoders.build import TOKENS_ALONE, Build
from memdec.decoders.corpus import Corpus
from memdec.decoders.manifest import alone, fingerprint, read_manifest, write_whole
from memdec.decoders.models import load_model
from memdec.decoders.ngram_package import BESIDE, CARD, ENOUGH, ORDERS, TOLERATED, model_card, score_by_order, split_scores
from memdec.decoders.perplexity import SCORED, Floats, label_logprobs, perplexity, scored
from memdec.decoders.reading.errors import OptionError
from memdec.decoders.reading.ngram import NgramMemory
from memdec.decoders.reading.ngram_record import NAME, NgramRecord
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.record import MATCHES, checked
from memdec.decoders.reading.shared_tensors import completed
from memdec.decoders.reading.tokenizer import load_copied, load_tokenizer, require_same_token_map, token_map_hash
from memdec.decoders.reading.weights import fingerprint_model

ROUNDS = 300  # of expectation maximisation; the weights have settled to four digits long before
DIGITS = 4  # of a stored weight
Mask = NDArray[np.bool_]
Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Fitted:
    """Weights of decoder and n-gram memory, and what they are worth."""

    weights: Floats
    """lambda_d and lambda_n by length of the longest match, [MATCHES, 2]."""
    perplexity: dict[str, float]
    """On the windows that decide, by BESIDE."""

    @property
    def better(self) -> bool:
        """Whether the two together are better than each alone, by more than what a shorter look-up is worth."""
        figures = self.perplexity
        return bool(np.log(min(figures["decoder"], figures["ngram"]) / figures["both"]) > TOLERATED)

    def to_json(self) -> dict[str, Any]:
        """Its part of an entry of the record: lambda, and each memory's shares of it."""
        lam = float(self.weights.sum(1).max()) or 1.0
        shares = np.floor(self.weights / lam * 10**DIGITS) / 10**DIGITS  # rounded up, a pair could add up to more than 1
        figures = {name: round(self.perplexity[name], 3) for name in BESIDE}
        return {"lambda": round(lam, DIGITS), "shares": shares.tolist(), "better": self.better, "perplexity": figures}


def fit_beside(out: Path, domain: str, corpus: Corpus, base: Path, decoder: Path, work: Path, most: int) -> dict[str, Any]:
    """Measure the package `out` beside a decoder on at most `most` windows of valid; returns the entry that its record now has.

    Raises DecoderError, one line, and leaves the package as it was.
    """
    memory = _opened(out, domain, base, decoder)
    tokens = Build(domain, corpus, base, out, work, TOKENS_ALONE).run("tokens")
    with alone(work):
        made_from = memory.record.training.get("corpus", {}).get("tokens")
        if made_from != fingerprint(read_manifest(tokens)["inputs"]):
            raise OptionError(f"--corpus {corpus.root}: {out} was made from other text, in which this valid split may be")
        with tempfile.TemporaryDirectory(prefix="memdec-") as cache:
            package = completed(Package.open(decoder), base, Path(cache))
            fitted = measure(memory, base, package.path, tokens, most)
        entry = {"decoder": package.revision, "base": fingerprint_model(base), **fitted.to_json()}
    _write(out, entry)
    return entry


def _opened(out: Path, domain: str, base: Path, decoder: Path) -> NgramMemory:
    """The package, when all that can be known before anything is measured is known to fit."""
    memory = NgramMemory.open(out)
    if memory.name != domain:
        raise OptionError(f"NAME {domain!r}: {out} is of {memory.name!r}")
    tokenizer = load_tokenizer(base)
    if memory.tokenizer != (own := token_map_hash(tokenizer)):
        raise OptionError(f"--base: its tokenizer has token map {own}, {out} was made with {memory.tokenizer}")
    require_same_token_map(tokenizer, load_copied(Package.open(decoder).path), "--beside")
    return memory


def measure(memory: NgramMemory, base: Path, decoder: Path, tokens: Path, most: int) -> Fitted:
    """Score the windows of valid with base, decoder and memory, and fit. Raises OptionError if they are too few to divide."""
    ids, starts, ours = split_scores(load_model(base), tokens, "valid", most)
    if len(starts) < 2:
        raise OptionError(f"--windows {most}: {len(starts)} windows of valid, wanted 2 or more: half fit, half decide")
    theirs = label_logprobs(load_model(decoder), np.asarray(ids), "valid decoder", starts)
    scores = score_by_order(memory, ids, scored(starts), np.exp(ours))
    parts = np.stack([np.exp(ours), np.exp(theirs), scores.probabilities[memory.order - ORDERS[0]]], 1)
    fitting = np.repeat(np.arange(len(starts)) % 2 == 0, SCORED)
    return fit_together(parts, np.minimum(scores.matched, memory.order - 1), fitting)


def fit_together(parts: Floats, matched: Lengths, fitting: Mask) -> Fitted:
    """Fit and compare. `parts` [tokens, 3] are what base, decoder and n-gram memory say of each token, `matched` [tokens] the lengths of the longest match."""
    alone = {"base": (), "decoder": (1,), "ngram": (2,)}
    found = {name: by_length(parts, matched, fitting, columns, fixed=name != "ngram") for name, columns in alone.items()}
    together = [by_length(parts, matched, fitting, (1, 2), fixed) for fixed in (True, False)]
    found["both"] = min(together, key=lambda weights: mixed_perplexity(parts, matched, ~fitting, weights))
    return Fitted(found["both"], {name: mixed_perplexity(parts, matched, ~fitting, weights) for name, weights in found.items()})


def by_length(parts: Floats, matched: Lengths, fitting: Mask, columns: Sequence[int], fixed: bool) -> Floats:
    """Weights of decoder and n-gram memory [MATCHES, 2] that are best where `fitting`; only those of `columns` are mixed in.

    `fixed`: the same for every length, as they also are for lengths that few tokens have. Without a match the memory says what the base says.
    """
    weights = np.tile(best_weights(parts[fitting], columns), (MATCHES, 1))
    for length in () if fixed else range(MATCHES):
        own = fitting & (matched == length)
        if own.sum() >= ENOUGH:
            weights[length] = best_weights(parts[own], columns if length else [c for c in columns if c != 2])
    return weights


def best_weights(parts: Floats, columns: Sequence[int]) -> Floats:
    """Weights [2] of decoder and n-gram memory in the mixture that makes tokens [n, 3] most likely, by expectation maximisation."""
    used = parts[:, [0, *columns]]
    weights = np.full(used.shape[1], 1 / used.shape[1])
    for _ in range(ROUNDS):
        of_tokens = weights * used
        weights = (of_tokens / of_tokens.sum(1, keepdims=True)).mean(0)
    found = np.zeros(3)
    found[[0, *columns]] = weights
    return found[1:]


def mixed_perplexity(parts: Floats, matched: Lengths, chosen: Mask, weights: Floats) -> float:
    """Perplexity of the mixture on the tokens that are `chosen`."""
    own = weights[matched[chosen]]
    mixed = (1 - own.sum(1)) * parts[chosen, 0] + (own * parts[chosen, 1:]).sum(1)
    return perplexity(np.log(mixed))


def _write(out: Path, entry: dict[str, Any]) -> None:
    """Put an entry into the record, in place of an older one of the same decoder and base, and into the model card."""
    fields = json.loads((out / NAME).read_text())
    others = [one for one in fields.get("beside", []) if (one["decoder"], one["base"]) != (entry["decoder"], entry["base"])]
    fields["beside"] = [*others, entry]
    checked(NgramRecord, fields, out / NAME)
    write_whole(out / NAME, json.dumps(fields, indent=1) + "\n")
    write_whole(out / CARD, model_card(fields))
