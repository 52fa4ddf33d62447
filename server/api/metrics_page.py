"""GET /metrics where several processes share a folder of metrics (PROMETHEUS_MULTIPROC_DIR): vLLM's page shows what is in that folder alone."""

import os

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from memdec.server import metrics

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
def page() -> Response:
    """All processes' metrics, and the time of the engine's steps, which every process asks the engine for."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(metrics.STEP_SECONDS)
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


def attach(app: FastAPI) -> None:
    """Add our page in place of vLLM's where processes share a folder of metrics."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        app.include_router(router)
