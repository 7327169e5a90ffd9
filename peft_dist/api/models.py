"""``/v1/models``: the base under each of its names, and the adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from peft_dist.api.errors import json_response
from peft_dist.api.state import ServerState


def models_router(state: ServerState) -> APIRouter:
    """The routes that list what ``model`` can name."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    async def list_models() -> Response:
        """The base and the adapters that ``model`` can name."""
        return json_response({"object": "list", "data": _cards(state)})

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> Response:
        """One of them."""
        cards = {card["id"]: card for card in _cards(state)}
        if model_id not in cards:
            # Whatever ``model`` of a request may be, such as the base's name before an adapter's.
            adapter = state.client.resolve(state.target(model_id))
            found = cards[state.model.served_model_name if adapter is None else adapter.name]
            cards[model_id] = {**found, "id": model_id}
        return json_response(cards[model_id])

    return router


def _cards(state: ServerState) -> list[dict[str, Any]]:
    model = state.model
    names = dict.fromkeys((model.served_model_name, *state.options.served_names))
    cards = [_card(state, name, model.model, None) for name in names]
    pinned = state.client.pinned_adapters()
    return cards + [
        _card(state, spec.name, spec.path, model.served_model_name) | {"pinned": spec.name in pinned}
        for spec in state.client.adapters()
    ]


def _card(state: ServerState, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "peft_dist",
        "root": root,
        "parent": parent,
        "max_model_len": state.model.max_model_len,
    }
