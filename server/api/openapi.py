"""What the OpenAPI description says beyond what FastAPI finds out: headers of requests and answers, errors, keys."""

from collections import Counter

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from memdec.server.api.access import NEEDS, Need
from memdec.server.engine.openai_layer import ErrorResponse
from memdec.server.json_types import JsonObject
from memdec.server.routing.domains import MODES

ERRORS: dict[int | str, JsonObject] = {  # naming a default keeps FastAPI from adding a 422 that is never sent
    400: {"model": ErrorResponse, "description": "The request can't be served as it stands; `param` names the field."},
    "default": {"model": ErrorResponse, "description": "Any other error, in the same form."},
}
CHOOSING = [
    {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
    for name, text, schema in (
        ("X-Domain", "The memory to answer with, one of /v1/domains; without it, the base answers.", {"type": "string"}),
        ("X-Lambda", "How much the memory counts; by default as tuned.", {"type": "number", "minimum": 0, "maximum": 1}),
        ("X-Memory", "How the domain is remembered; a domain's modes are in /v1/domains.", {"type": "string", "enum": list(MODES)}),
    )
]
USED = {
    name: {"description": text, "required": required, "schema": {"type": "string"}}
    for name, text, required in (
        ("X-Memory-Mode", "The mode used.", True),
        ("X-Memory-Domain", "The domain used, if there was one.", False),
        ("X-Memory-Lambda", "The lambda used, if there was a domain.", False),
    )
}
REQUEST_ID = {"X-Request-Id": {"description": "The request's id: the client's own, or a random one.", "schema": {"type": "string"}}}
EXPOSED = [*USED, *REQUEST_ID, "Retry-After"]
"""Headers that scripts of allowed origins may read."""


class Model(BaseModel):
    """One model or alias."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: str = "model"
    created: int
    owned_by: str
    max_model_len: int
    root: str
    parent: str | None


class Models(BaseModel):
    """The base, and one alias a domain."""

    object: str = "list"
    data: list[Model]


class DatastoreEntry(BaseModel):
    """What the modes `knn` and `rag` look things up in."""

    model_config = ConfigDict(extra="forbid")

    entries: int
    lam: float = Field(alias="lambda")
    size_bytes: int
    revision: str


class NgramEntry(BaseModel):
    """What the mode `ngram` looks contexts up in."""

    model_config = ConfigDict(extra="forbid")

    order: int = Field(description="Longest n-gram, in tokens.")
    tokens: int
    lam: float = Field(alias="lambda")
    lambda_tuned: bool
    sources: bool = Field(description="Whether `memory_sources` may be asked for.")
    size_bytes: int
    revision: str
    perplexity: dict[str, float] | None


class BothEntry(BaseModel):
    """How the mode `both` mixes decoder and n-gram memory in together."""

    model_config = ConfigDict(extra="forbid")

    lam: float = Field(alias="lambda", description="Weight of the two together, where that is largest.")
    better: bool = Field(description="Whether it was better than each alone, and is the default.")
    decoder_shares: list[float] = Field(description="The decoder's share of lambda after a longest match of 0, 1, … tokens.")
    ngram_shares: list[float] = Field(description="The n-gram memory's; what is left of lambda is the base's.")
    perplexity: dict[str, float] | None


class DomainEntry(BaseModel):
    """One domain."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: str = "domain"
    name: str
    lam: float = Field(alias="lambda", description="Lambda of requests that name none.")
    lambda_tuned: bool
    modes: list[str]
    revision: str
    size_bytes: int
    tokenizer_hash: str
    perplexity: JsonObject | None
    datastore: DatastoreEntry | None
    ngram: NgramEntry | None
    both: BothEntry | None


class DomainEntries(BaseModel):
    """All domains that the key may use; and, where domains may change, for keys of all domains, the slots."""

    object: str = "list"
    data: list[DomainEntry]
    slots: JsonObject | None = None


class DomainDeleted(BaseModel):
    """A domain that takes no more requests."""

    id: str
    object: str = "domain"
    deleted: bool


def answered(model: type[BaseModel], status: int = 200) -> JsonObject:
    """Arguments of a route whose function makes its JSON itself: the schema is described, and nothing is checked again."""
    return {"response_model": None, "responses": {status: {"model": model}}}


def with_memory(model: type[BaseModel]) -> JsonObject:
    """Arguments of a route that a memory can be chosen for."""
    stream = {
        "text/event-stream": {"schema": {"type": "string", "description": "With `stream`: one `data: {…}` an event, last `data: [DONE]`."}}
    }
    return {
        "response_model": None,
        "responses": {200: {"model": model, "headers": USED, "content": stream}},
        "openapi_extra": {"parameters": CHOOSING},
    }


def complete(app: FastAPI, keyed: bool) -> None:
    """Add to the app's description what concerns all routes: the id on every answer, and which key each route needs."""
    plain = app.openapi

    def described() -> JsonObject:
        if app.openapi_schema is None:
            _complete(plain(), keyed)
        return plain()

    app.openapi = described  # type: ignore[method-assign]


def _complete(description: JsonObject, keyed: bool) -> None:
    schemas = description["components"]["schemas"]
    titles = Counter(schema.get("title") for schema in schemas.values())
    for name, schema in schemas.items():
        if titles[schema.get("title")] > 1:
            schema["title"] = name  # makers of clients name classes by titles, and drop all but one of a name
    schemes = {}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                answer["headers"] = {**answer.get("headers", {}), **REQUEST_ID}
                if not status.startswith("2"):  # errors are JSON where the route's own answers are not
                    answer["content"] = {"application/json": next(iter(answer["content"].values()))}
            need = next((n for route, n in NEEDS.items() if route.replace(":path", "") == f"{method.upper()} {path}"), Need.KEY)
            if need is Need.ADMIN or (keyed and need is not Need.NOTHING):
                name = "admin" if need is Need.ADMIN else "key"
                operation["security"] = [{name: []}]
                schemes[name] = {"type": "http", "scheme": "bearer", "description": need.value}
    if schemes:
        description["components"]["securitySchemes"] = schemes
