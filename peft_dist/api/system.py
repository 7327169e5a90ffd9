"""Routes for those who run the server: ``/health``, ``/version``, ``/metrics``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

import peft_dist
from peft_dist.api.errors import json_response
from peft_dist.api.state import ServerState


def system_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["system"])

    @router.get("/health")
    async def health() -> Response:
        """200 while requests can be served, 503 when the worker is dead."""
        state.check_alive()
        return json_response({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        """The release that runs here."""
        return json_response({"version": peft_dist.__version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Gauges and counters in Prometheus' text format."""
        return PlainTextResponse(_exposition(state), media_type="text/plain; version=0.0.4")

    return router


def _exposition(state: ServerState) -> str:
    stats = state.client.stats()
    used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
    rows: list[tuple[str, str, str, float]] = [
        ("healthy", "gauge", "1 while requests can be served.", state.client.is_healthy),
        ("requests_running", "gauge", "Sequences in the running batch.", stats.num_running),
        ("requests_waiting", "gauge", "Sequences that wait for the engine.", stats.num_waiting),
        ("requests_swapped", "gauge", "Sequences whose KV is in host memory.", stats.num_swapped),
        ("kv_blocks", "gauge", "KV blocks on the device.", stats.num_blocks),
        ("kv_blocks_free", "gauge", "KV blocks that no sequence holds.", stats.num_free_blocks),
        ("kv_cache_usage_ratio", "gauge", "Share of the KV blocks in use, 0 to 1.", used),
        ("adapters_served", "gauge", "Adapters that requests can name.", len(state.client.adapters())),
        ("adapters_resident", "gauge", "Adapters on the device.", len(stats.resident_adapters)),
        ("preemptions_total", "counter", "Sequences put back because KV blocks ran out.", stats.num_preemptions),
        ("prefix_cache_queries_total", "counter", "Prompt tokens looked up.", stats.prefix_cache_queries),
        ("prefix_cache_hits_total", "counter", "Prompt tokens found.", stats.prefix_cache_hits),
    ]
    lines = [
        f"# HELP peft_dist_{name} {text}\n# TYPE peft_dist_{name} {kind}\npeft_dist_{name} {float(value):g}\n"
        for name, kind, text, value in rows
    ]
    return "".join(lines)
