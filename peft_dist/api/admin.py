"""Taking replicas out of service and back while the server runs."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from peft_dist.api.errors import json_response
from peft_dist.api.state import ServerState


class DrainRequest(BaseModel):
    """What becomes of the replica when it is empty."""

    model_config = ConfigDict(strict=True, extra="forbid")

    restart: bool | None = Field(None, description="End it then, and start it again.")
    timeout: float | None = Field(None, gt=0, description="Answer after so many seconds in any case; it drains on.")


class ResumeRequest(BaseModel):
    """Nothing needs to be said."""

    model_config = ConfigDict(strict=True, extra="forbid")


class RollingRestartRequest(BaseModel):
    """Nothing needs to be said."""

    model_config = ConfigDict(strict=True, extra="forbid")


def admin_router(state: ServerState) -> APIRouter:
    """The routes that drain and resume replicas."""
    router = APIRouter(prefix="/admin", tags=["replicas"])

    def state_of(replica: int) -> str:
        return next((view.state for view in state.client.replicas() if view.replica_id == replica), "left")

    @router.post("/drain/{replica}")
    async def drain(replica: int, body: DrainRequest | None = None) -> Response:
        """Move a replica's requests to others, and answer when it is empty; ``restart`` then starts it again.

        ``state``: "drained"; "restarting", or "left" if it had joined; "unreached" where its connection failed as it
        was told that it is drained. 409 where it died before it was empty, 202 and "draining" after ``timeout``.
        """
        restart = body is not None and bool(body.restart)
        try:
            async with asyncio.timeout(None if body is None else body.timeout):
                await state.client.drain_replica(replica, restart=restart)
        except TimeoutError:
            return json_response({"replica": replica, "state": state_of(replica)}, 202)
        now = state_of(replica)
        if restart and now != "left":
            now = "restarting"
        return json_response({"replica": replica, "state": now})

    @router.post("/rolling-restart")
    async def begin_rolling_restart(body: RollingRestartRequest | None = None) -> Response:
        """Drain, end and start again one replica after another; answers at once, and GET tells how far it is."""
        return json_response(asdict(state.client.rolling.begin()), 202)

    @router.get("/rolling-restart")
    async def rolling_restart() -> Response:
        """How far the last rolling restart is."""
        return json_response(asdict(state.client.rolling.view()))

    @router.delete("/rolling-restart")
    async def cancel_rolling_restart() -> Response:
        """Go no further; the replica whose turn it is comes back by itself."""
        return json_response(asdict(state.client.rolling.cancel()))

    @router.post("/resume/{replica}")
    async def resume(replica: int, body: ResumeRequest | None = None) -> Response:
        """Let a drained replica take requests again.

        ``state``: "ready"; or "dead" or "starting" where it died, and serves once it has been started again.
        """
        state.client.resume_replica(replica)
        await state.client.drain_kept(replica)
        return json_response({"replica": replica, "state": state_of(replica)})

    return router
