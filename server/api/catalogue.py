"""What this server offers: /v1/domains and /v1/models."""

import time
from typing import Any

from fastapi import APIRouter, Request

from memdec.server.api.keys import Key
from memdec.server.api.openapi import DomainEntries, DomainEntry, Model, Models, answered
from memdec.server.errors import UnknownModel
from memdec.server.json_types import JsonObject
from memdec.server.routing.domains import Domains

router = APIRouter()
tokenizer_router = APIRouter()  # where --enable-tokenizer-info-endpoint asks for it
CREATED = int(time.time())


def offered(request: Request) -> Domains:
    """The domains that this request's API key may use; without keys, all."""
    domains: Domains = request.app.state.loaded.current.domains
    key: Key | None = getattr(request.state, "key", None)
    return domains if key is None or key.domains is None else domains.only(key.may_use)


def require_model(name: str, domains: Domains) -> None:
    """Raise UnknownModel unless a model field names the base, or begins as an alias of a domain does."""
    if name != domains.base and not name.startswith(f"{domains.base}:"):
        valid = ", ".join([domains.base, *(domains.alias(d) for d in domains)])
        raise UnknownModel(f"The model {name[:80]!r} does not exist. Valid models: {valid}.")


@router.get("/v1/domains", **answered(DomainEntries))
async def domains(request: Request) -> JsonObject:
    """All domains: default lambda, revision, size, tokenizer hash, measured perplexities; and slots, if domains may change.

    Slots are shown to whoever may use all domains.
    """
    seen, updates = offered(request), getattr(request.app.state, "domain_updates", None)
    slots = {"slots": updates.slots_json()} if updates is not None and seen is request.app.state.loaded.current.domains else {}
    return {"object": "list", "data": [d.to_json() for d in seen], **slots}


@router.get("/v1/domains/{name}", **answered(DomainEntry))
async def domain(name: str, request: Request) -> JsonObject:
    """One domain."""
    return offered(request).find(name).to_json()


@router.get("/v1/models", **answered(Models))
async def models(request: Request) -> JsonObject:
    """The base and one alias a domain."""
    return {"object": "list", "data": _cards(request)}


@router.get("/v1/models/{name:path}", **answered(Model))
async def model(name: str, request: Request) -> JsonObject:
    """One model or alias."""
    cards = {card["id"]: card for card in _cards(request)}
    if name not in cards:
        raise UnknownModel(f"The model {name[:80]!r} does not exist. Valid models: {', '.join(cards)}.")
    return cards[name]


@tokenizer_router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Any:
    """vLLM's: the tokenizer's configuration, with the chat template that the server uses."""
    return await request.app.state.serving_tokenization.get_tokenizer_info()


def _cards(request: Request) -> list[JsonObject]:
    domains = offered(request)
    length = request.app.state.vllm_config.model_config.max_model_len
    shared = {"object": "model", "created": CREATED, "owned_by": "memdec", "max_model_len": length}
    base = {"id": domains.base, **shared, "root": domains.base, "parent": None}
    return [base, *({"id": domains.alias(d), **shared, "root": d.name, "parent": domains.base} for d in domains)]
