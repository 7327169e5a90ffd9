"""Routes for those who run the server: ``/health``, ``/ready``, ``/version``, ``/metrics``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.responses import PlainTextResponse, Response

import peft_dist
from peft_dist.api.errors import ApiError, json_response
from peft_dist.api.metrics import CONTENT_TYPE
from peft_dist.api.state import ServerState
from peft_dist.core.adapter import AdapterSpec
from peft_dist.orchestrator.observation import ReplicaView


def _lacks(view: ReplicaView, adapters: list[AdapterSpec], *, is_cold: bool) -> str:
    """Why a replica does not serve everything."""
    if view.state != "ready":
        return f"is {view.state}"
    if is_cold:
        return "warms up"
    if view.coming:
        return f"waits for {len(view.coming)} {'adapter' if len(view.coming) == 1 else 'adapters'}"
    return "refused " + ", ".join(repr(spec.name) for spec in adapters if spec.content_hash in view.refused)


def _refused(views: list[ReplicaView], adapters: list[AdapterSpec]) -> dict[str, list[str]]:
    """Names of adapters that a replica which serves did not take, by replica."""
    found = {
        str(view.replica_id): [spec.name for spec in adapters if spec.content_hash in view.refused]
        for view in views
        if view.is_ready and view.refused
    }
    return {replica: names for replica, names in found.items() if names}


def _missing(views: list[ReplicaView], adapters: list[AdapterSpec]) -> list[str]:
    """Names of adapters that no replica takes requests for."""
    whole = any(view.serves_all for view in views)
    return [] if whole else [a.name for a in adapters if not any(view.serves(a.content_hash) for view in views)]


def _told(state: ServerState) -> dict[str, Any]:
    views, adapters = state.client.replicas(), state.client.adapters()
    refused, missing = _refused(views, adapters), _missing(views, adapters)
    return {
        "status": "degraded" if refused or missing else "ok",
        "replicas": {str(view.replica_id): view.state for view in views},
        "refused": refused,
        "missing": missing,
        "not_served": state.not_served(),
    }


def system_router(state: ServerState) -> APIRouter:
    """The routes that tell how the server is; they ask for no key."""
    router = APIRouter(tags=["system"])

    @router.get("/health")
    async def health() -> Response:
        """200 while requests can be served, 503 when no replica takes any."""
        state.check_alive()
        return json_response(_told(state))

    @router.get("/ready")
    async def ready(
        replicas: Annotated[int | None, Query(ge=1)] = None,
        adapters: Literal["any", "all"] = "any",
        warm: bool = False,
    ) -> Response:
        """200 while at least one replica takes requests and waits for no adapter: others may start, drain or be dead.

        ``replicas``: At least so many, for every model. ``adapters=all``: Only while each adapter has a replica.
        ``warm=true``: Only replicas count that have compiled and captured all that they do ahead.
        """
        views = state.client.replicas()
        cold = {view.replica_id for view in views if warm and not view.is_warm}
        counted = [view for view in views if view.replica_id not in cold]
        whole = sum(view.serves_all for view in counted)
        if (whole if replicas else sum(view.can_serve for view in counted)) < (replicas or 1):
            known = state.client.adapters()
            away = ", ".join(
                f"replica {view.replica_id} {_lacks(view, known, is_cold=view.replica_id in cold)}"
                for view in views
                if view.replica_id in cold or not view.serves_all
            )
            reason = f"{whole} of {len(views)} replicas serve, {replicas or 1} asked for"
            raise ApiError(503, f"{reason}: {away}." if away else f"{reason}.", code="not_ready")
        told = _told(state)
        if adapters == "all" and (missing := _missing(counted, state.client.adapters())):
            names = ", ".join(map(repr, missing))
            raise ApiError(503, f"No replica serves {names}: load in place, or unload.", code="not_ready")
        return json_response({**told, "serving": whole, "of": len(views)})

    @router.get("/version")
    async def version() -> Response:
        """The release that runs here."""
        return json_response({"version": peft_dist.__version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Gauges, counters and histograms in Prometheus' text format; asks for no key, as it does in vLLM."""
        return Response(await state.metrics.exposition(), media_type=CONTENT_TYPE)

    return router
