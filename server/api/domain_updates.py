"""POST /v1/domains and DELETE /v1/domains/{name}, for the admin: attached only where domains may change."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from memdec.server.api.body import require_sound
from memdec.server.api.openapi import DomainDeleted, DomainEntry, answered
from memdec.server.json_types import JsonObject

router = APIRouter()
PATH = "/v1/domains"


class NewDomain(BaseModel):
    """The body of a POST."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=200)
    path: str = Field(max_length=5000)
    """Folder of the decoder on the server's machine: absolute, or relative to one of the --domain-root folders."""


@router.post(
    PATH, dependencies=[Depends(require_sound)], response_model=None, responses={200: {"model": DomainEntry}, 201: {"model": DomainEntry}}
)
async def load(body: NewDomain, request: Request) -> JSONResponse:
    """Load a decoder under a new name, 201, or as the next revision of a domain, 200."""
    updates = request.app.state.domain_updates
    domain, new = await updates.load(body.name, body.path)
    return JSONResponse(domain.to_json(), status_code=201 if new else 200)


@router.delete(f"{PATH}/{{name}}", **answered(DomainDeleted))
async def unload(name: str, request: Request) -> JsonObject:
    """Take no more requests for a domain; its decoder is unloaded when the last one is done."""
    await request.app.state.domain_updates.unload(name)
    return {"id": name, "object": "domain", "deleted": True}
