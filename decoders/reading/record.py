"""Schemas of a package's JSON files: every key is checked before any is used, and each fault is reported in one line."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from memdec.decoders.reading.errors import PackageError
from memdec.decoders.reading.files import shown

FORMAT = 1
SHARING = 2  # format of a package that leaves out tensors which its base has
DEFAULT_LAMBDA = 0.6  # the paper's v1, table 7: best or near it for most models
LARGEST = 1 << 31  # above every dimension of a model and every number of measured tokens


def is_lambda(value: object) -> bool:
    """Whether a value is a usable lambda: a finite number in [0, 1], booleans not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def wants(test: Callable[[Any], bool], wanted: str) -> BeforeValidator:
    """A validator that runs `test` on the value as parsed from JSON; `wanted` completes the error message."""

    def check(value: Any) -> Any:
        if not test(value):
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
        return value

    return BeforeValidator(check)


def _number(value: Any, above: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value <= most


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST


def _dict(value: Any) -> bool:
    return isinstance(value, dict)


Lambda = Annotated[float, wants(is_lambda, "a number from 0 to 1")]
Perplexity = Annotated[float, wants(lambda v: _number(v, 0, 1e300), "a finite number above 0")]
Positive = Annotated[float, wants(lambda v: _number(v, 0, 1e300), "a finite number above 0")]
Count = Annotated[int, wants(_count, f"a whole number from 1 to {LARGEST - 1:,}")]
Text = Annotated[str, wants(lambda v: isinstance(v, str) and 0 < len(v) <= 200, "a text of 1 to 200 characters")]
Hash = Annotated[str, wants(lambda v: isinstance(v, str) and 0 < len(v) <= 64 and v.isalnum(), "a hash")]
Digest = Annotated[str, wants(lambda v: isinstance(v, str) and len(v) == 64 and v.isalnum(), "a SHA-256 of 64 digits")]


class Strict(BaseModel):
    """Base of the schemas: unknown keys are refused, and types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Figures(Strict):
    """Figures of a decoder measured beside one base."""

    name: Text | None = None
    lam: Lambda | None = Field(default=None, alias="lambda")
    base: Perplexity | None = None
    memory: Perplexity | None = None
    mixture: Perplexity | None = None
    covered: Lambda | None = None
    """Share of the tokens that the memory can predict, on which `memory` is measured; absent: all."""
    tokens: Count | None = None
    window: Count | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures that are set, by their JSON names."""
        return self.model_dump(by_alias=True, exclude_none=True)


class SharedTensor(Strict):
    """A tensor that a package leaves out, since its base has it."""

    tensor: Text
    """Its name in the base."""
    sha256: Digest
    """SHA-256 of its type, shape and bytes."""


class Record(Strict):
    """memory_decoder.json."""

    format: Literal[1, 2] = 1
    domain: Text | None = None
    """Name given in training; None for a plain checkpoint."""
    lam: Lambda = Field(default=DEFAULT_LAMBDA, alias="lambda")
    token_map: Hash | None = None
    """Hash of the token -> id map it was trained with."""
    bases: Annotated[dict[Hash, Annotated[Figures, wants(_dict, "an object")]], wants(_dict, "an object of objects")] = {}
    """Fingerprint of a base -> what was measured beside it."""
    shared: Annotated[dict[Text, Annotated[SharedTensor, wants(_dict, "an object")]], wants(_dict, "an object of objects")] = {}
    """Name of a tensor -> where the base has it; of format SHARING alone."""
    training: Annotated[dict[str, Any], wants(_dict, "an object")] = {}
    """What it was made from, for people: nothing here is used."""


class Config(BaseModel):
    """config.json: the numbers that every architecture's has, under the names that they have there; the rest is transformers' to judge."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    architectures: Annotated[
        list[str], wants(lambda v: isinstance(v, list) and len(v) == 1 and isinstance(v[0], str), "a list with one name")
    ]
    model_type: Text | None = None
    vocab_size: Count | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | None = None
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count | None = None
    n_embd: Count | None = None
    n_layer: Count | None = None
    n_head: Count | None = None
    n_positions: Count | None = None
    rms_norm_eps: Positive | None = None
    layer_norm_epsilon: Positive | None = None


class KnnRecord(Strict):
    """Tuned parameters of the kNN-LM."""

    neighbours: Count
    tau: Positive
    lam: Lambda
    probed: Count


class RagRecord(Strict):
    """Parameters of RAG, in tokens."""

    passage: Count = 128
    query: Count = 32
    stride: Count = 64


class FileRecord(Strict):
    """Size and hash of one file."""

    bytes: Annotated[int, wants(lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62, "a number of bytes")]
    sha256: Digest


MATCHES = 8  # lengths of a longest match that shares are stored for: 0 to 7 tokens


def _are_shares(value: Any) -> bool:
    pairs = isinstance(value, list) and len(value) == MATCHES and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and all(is_lambda(share) for pair in value for share in pair) and all(sum(pair) <= 1 for pair in value)


class BesideRecord(Strict):
    """How an n-gram memory goes together with one decoder, beside one base."""

    decoder: Hash
    """The decoder's revision."""
    base: Hash
    """The base's fingerprint."""
    lam: Lambda = Field(alias="lambda")
    """Weight of the two together, after the length of match where it is largest."""
    shares: Annotated[list[list[float]], wants(_are_shares, f"{MATCHES} pairs of numbers from 0 to 1, no pair's sum above 1")]
    """The decoder's and the memory's share of lambda, where the longest match has 0, 1, … tokens."""
    better: bool
    """Whether the two together were better than each alone."""
    perplexity: Annotated[dict[Text, Perplexity], wants(_dict, "an object")] = {}
    """On text that the shares were not fitted on."""


def _inside(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 200 and not {"", ".", ".."} & set(name.split("/"))


FileName = Annotated[str, wants(_inside, "the name of a file in the folder")]


class RetrievalRecord(Strict):
    """retrieval.json."""

    format: Literal[1]
    domain: Text
    base: Hash
    key: Text
    entries: Count
    knn: Annotated[KnnRecord, wants(_dict, "an object")]
    rag: Annotated[RagRecord, wants(_dict, "an object")]
    perplexity: Annotated[dict[Text, Perplexity], wants(_dict, "an object")]
    corpus: Text | None = None
    files: Annotated[dict[FileName, Annotated[FileRecord, wants(_dict, "an object")]], wants(_dict, "an object")]


Kind = TypeVar("Kind", bound=BaseModel)


def checked(kind: type[Kind], value: dict[str, Any], name: object) -> Kind:
    """Validate a file's JSON object. Raises PackageError that names the file, the first wrong key, its value, and what is wanted."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        raise PackageError(f"{name}: {key} is no key of this file; wanted {', '.join(_keys(kind, first['loc']))}")
    if first["type"] == "missing":
        raise PackageError(f"{name}: {key} is missing")
    raise PackageError(f"{name}: {key} is {shown(first['input'])}, wanted {first['msg'].removeprefix('Input should be ')}")


PARTS: dict[str, type[BaseModel]] = {
    "bases": Figures, "shared": SharedTensor, "knn": KnnRecord, "rag": RagRecord, "files": FileRecord, "beside": BesideRecord,
}  # fmt: skip


def _keys(kind: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at the place of an unknown one."""
    model = PARTS.get(str(place[0]), kind) if len(place) > 1 else kind
    return [field.alias or name for name, field in model.model_fields.items()]
