"""What this server offers: /v1/domains and /v1/models."""

import time
from typing import Any

from fastapi import APIRouter, Request

from server.errors import RequestError
from server.routing.domains import Domains

router = APIRouter()
CREATED = int(time.time())


class UnknownModel(RequestError):
    """No model or alias of that name."""

    status, type, param = 404, "NotFoundError", "model"


@router.get("/v1/domains")
async def domains(request: Request) -> dict[str, Any]:
    """All domains: default lambda, revision, size, tokenizer hash, measured perplexities; and slots, if domains may change."""
    updates = getattr(request.app.state, "domain_updates", None)
    slots = {"slots": updates.slots_json()} if updates is not None else {}
    return {"object": "list", "data": [d.to_json() for d in request.app.state.domains], **slots}


@router.get("/v1/domains/{name}")
async def domain(name: str, request: Request) -> dict[str, Any]:
    """One domain."""
    found: dict[str, Any] = request.app.state.domains.find(name).to_json()
    return found


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The base and one alias a domain."""
    return {"object": "list", "data": _cards(request)}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One model or alias."""
    cards = {card["id"]: card for card in _cards(request)}
    if name not in cards:
        raise UnknownModel(f"The model {name[:80]!r} does not exist. Valid models: {', '.join(cards)}.")
    return cards[name]


def _cards(request: Request) -> list[dict[str, Any]]:
    offered: Domains = request.app.state.domains
    length = request.app.state.vllm_config.model_config.max_model_len
    shared = {"object": "model", "created": CREATED, "owned_by": "memdec", "max_model_len": length}
    base = {"id": offered.base, **shared, "root": offered.base, "parent": None}
    return [base, *({"id": offered.alias(d), **shared, "root": d.name, "parent": offered.base} for d in offered)]
