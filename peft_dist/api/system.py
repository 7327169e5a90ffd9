"""Routes for those who run the server: ``/health``, ``/ready``, ``/version``, ``/metrics``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

import peft_dist
from peft_dist.api.errors import ApiError, json_response
from peft_dist.api.metrics import CONTENT_TYPE
from peft_dist.api.state import ServerState


def system_router(state: ServerState) -> APIRouter:
    """The routes that tell how the server is; they ask for no key."""
    router = APIRouter(tags=["system"])

    @router.get("/health")
    async def health() -> Response:
        """200 while requests can be served, 503 when no replica takes any."""
        state.check_alive()
        replicas = {str(view.replica_id): view.state for view in state.client.replicas()}
        return json_response({"status": "ok", "replicas": replicas})

    @router.get("/ready")
    async def ready() -> Response:
        """200 while every replica serves; 503 while one starts, drains or is dead, though the others may serve."""
        away = [view for view in state.client.replicas() if view.state != "ready"]
        if away:
            states = ", ".join(f"replica {view.replica_id} is {view.state}" for view in away)
            raise ApiError(503, f"Not all replicas serve: {states}.", code="not_ready")
        return json_response({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        """The release that runs here."""
        return json_response({"version": peft_dist.__version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Gauges, counters and histograms in Prometheus' text format; asks for no key, as it does in vLLM."""
        return Response(await state.metrics.exposition(), media_type=CONTENT_TYPE)

    return router
