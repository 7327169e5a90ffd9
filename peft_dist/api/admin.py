"""Taking replicas out of service and back while the server runs."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from peft_dist.api.errors import json_response
from peft_dist.api.state import ServerState


def admin_router(state: ServerState) -> APIRouter:
    """The routes that drain and resume replicas."""
    router = APIRouter(prefix="/admin", tags=["replicas"])

    @router.post("/drain/{replica}")
    async def drain(replica: int, restart: bool = False) -> Response:
        """Move a replica's requests to others, and answer when it is empty; ``restart`` then starts it again."""
        await state.client.drain_replica(replica, restart=restart)
        return json_response({"replica": replica, "state": "restarting" if restart else "drained"})

    @router.post("/resume/{replica}")
    async def resume(replica: int) -> Response:
        """Let a drained replica take requests again."""
        state.client.resume_replica(replica)
        return json_response({"replica": replica, "state": "ready"})

    return router
