"""Routes for those who run the server: ``/health``, ``/ready``, ``/version``, ``/metrics``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import PlainTextResponse, Response

import peft_dist
from peft_dist.api.errors import ApiError, json_response
from peft_dist.api.metrics import CONTENT_TYPE
from peft_dist.api.state import ServerState
from peft_dist.orchestrator.observation import ReplicaView


def _lacks(view: ReplicaView) -> str:
    """Why a replica does not serve everything."""
    if view.state == "ready":
        return f"waits for {view.num_coming} {'adapter' if view.num_coming == 1 else 'adapters'}"
    return f"is {view.state}"


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
    async def ready(replicas: Annotated[int, Query(ge=1)] = 1) -> Response:
        """200 while at least so many replicas take requests for every model: others may start, drain or be dead."""
        views = state.client.replicas()
        number = sum(view.can_serve for view in views)
        if number < replicas:
            away = ", ".join(f"replica {view.replica_id} {_lacks(view)}" for view in views if not view.can_serve)
            reason = f"{number} of {len(views)} replicas serve, {replicas} asked for"
            raise ApiError(503, f"{reason}: {away}." if away else f"{reason}.", code="not_ready")
        states = {str(view.replica_id): view.state for view in views}
        return json_response({"status": "ok", "serving": number, "of": len(views), "replicas": states})

    @router.get("/version")
    async def version() -> Response:
        """The release that runs here."""
        return json_response({"version": peft_dist.__version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Gauges, counters and histograms in Prometheus' text format; asks for no key, as it does in vLLM."""
        return Response(await state.metrics.exposition(), media_type=CONTENT_TYPE)

    return router
