"""The schema of an n-gram memory's record, ngram.json."""

from typing import Annotated, Any, Literal

from pydantic import Field

from memdec.decoders.reading.record import (
    BesideRecord,
    Count,
    FileName,
    FileRecord,
    Hash,
    Lambda,
    Perplexity,
    Strict,
    Text,
    is_lambda,
    wants,
)

NAME = "ngram.json"
DOCUMENTS = "documents.json"
FORMAT = 1
DEFAULT_LAMBDA = (
    0.25  # where nothing was measured: between the best on contracts and on central banks' minutes, and those on encyclopaedias
)
DEFAULT_ORDER = 6  # beyond it little was gained on any corpus that was tried
LONGEST_ORDER = 8  # discounts are estimated, and frequent contexts stored, for n-grams up to this


def _dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_order(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= LONGEST_ORDER


def _are_discounts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == LONGEST_ORDER - 1 and all(isinstance(d, float) and 0 < d < 1 for d in value)


def _are_weights(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (0, LONGEST_ORDER - 1) and all(is_lambda(weight) for weight in value)


class NgramRecord(Strict):
    """ngram.json."""

    format: Literal[1]
    domain: Text
    order: Annotated[int, wants(_is_order, f"a whole number from 2 to {LONGEST_ORDER}")]
    """The longest n-gram that is counted; contexts have a token less."""
    shortest: Count = 1
    """The shortest context that is looked up, in tokens."""
    lam: Lambda = Field(alias="lambda")
    tuned: bool
    """Whether lambda and order were tuned on the corpus's validation split."""
    discounts: Annotated[list[float], wants(_are_discounts, f"{LONGEST_ORDER - 1} numbers between 0 and 1")]
    """Discount for contexts of 1, 2, … tokens."""
    weights: Annotated[list[float], wants(_are_weights, f"none, or {LONGEST_ORDER - 1} numbers from 0 to 1")] = Field(default_factory=list)
    """Weight of the sparse part where the longest match has 1, 2, … tokens; none: 1 everywhere."""
    tokens: Count
    vocabulary: Count
    """Token ids of its tokenizer."""
    token_map: Hash
    """Hash of its tokenizer's token -> id map."""
    end: Annotated[int, wants(lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "a token id")]
    """The token behind each document."""
    sources: bool = False
    """Whether answers may name the documents that a continuation comes from."""
    shards: Count
    base: Hash | None = None
    """Fingerprint of the base that lambda was tuned beside."""
    perplexity: Annotated[dict[Text, Perplexity], wants(_dict, "an object")] = Field(default_factory=dict)
    beside: Annotated[list[BesideRecord], wants(lambda v: isinstance(v, list), "a list")] = Field(default_factory=list)
    """What `memdec ngram --beside` measured."""
    training: Annotated[dict[str, Any], wants(_dict, "an object")] = Field(default_factory=dict)
    """What it was made from, for people: nothing here is used."""
    files: Annotated[dict[FileName, Annotated[FileRecord, wants(_dict, "an object")]], wants(_dict, "an object")]
