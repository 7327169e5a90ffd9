"""``/v1/models``: the base under each of its names, and the adapters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from peft_dist.api.errors import ApiError, json_response
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
        for card in _cards(state):
            if card["id"] == model_id:
                return json_response(card)
        raise ApiError(
            404,
            f"the model {model_id!r} does not exist: /v1/models lists those that do",
            param="model",
            code="model_not_found",
        )

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
