"""/live, for probes that restart a server: unlike /health it stays 200 while the server drains."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from memdec.server.engine.protocols import Engine

router = APIRouter()


@router.get("/live")
async def live(request: Request) -> JSONResponse:
    """Whether the engine steps, and for how many seconds it has owed a step (null: there is no work). 503 for a dead engine, or one that hangs."""
    engine: Engine = request.app.state.engine_client
    waited = engine.liveness.waited()
    status = "dead" if engine.errored else "hung" if engine.liveness.hung else "alive"
    body = {"status": status, "seconds_without_a_step": None if waited is None else round(waited, 3)}
    return JSONResponse(body, 200 if status == "alive" else 503)
