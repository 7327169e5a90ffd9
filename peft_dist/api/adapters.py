"""Loading and unloading of adapters while the server runs (vLLM's routes and texts)."""

from __future__ import annotations

import logging

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from peft_dist.api.errors import ApiError
from peft_dist.api.protocol_adapters import LoadAdapterRequest, UnloadAdapterRequest
from peft_dist.api.state import ServerState
from peft_dist.api.unimplemented import refuse_in_load
from peft_dist.core.errors import UnknownModelError

logger = logging.getLogger("peft_dist.serve")


def adapters_router(state: ServerState) -> APIRouter:
    """The routes that load and unload adapters."""
    router = APIRouter(tags=["adapters"])

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        """Load an adapter; it is checked whole before anything uses it."""
        refuse_in_load(body.model_extra or {})
        _check_name(state, body)
        options = state.options
        spec = await state.client.load_adapter(
            body.lora_name,
            body.lora_path,
            replace=bool(body.load_inplace),
            pinned=body.pinned,
            allow_hub=options.allow_hub_load,
            root=None if options.adapter_dir is None else str(options.adapter_dir),
            allow_pickle=options.allow_pickle,
        )
        logger.info("Adapter %r (rank %d) is loaded from %s", body.lora_name, spec.max_rank, spec.path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        """Stop serving an adapter; requests that run already finish."""
        try:
            await state.client.unload_adapter(body.lora_name)
        except UnknownModelError as error:
            raise ApiError(404, str(error), param="lora_name", code="adapter_not_found") from error
        logger.info("Adapter %r is unloaded", body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _check_name(state: ServerState, body: LoadAdapterRequest) -> None:
    name = body.lora_name
    if any(spec.name == name for spec in state.client.adapters()):
        if not body.load_inplace:
            raise _name_taken(
                f"the LoRA adapter {name!r} has already been loaded: unload it first, or set load_inplace to true"
            )
    elif _is_known(state, name):
        raise _name_taken(f"{name!r} means the base model or one of its adapters already: choose another name")


def _is_known(state: ServerState, name: str) -> bool:
    try:
        state.target(name)
    except UnknownModelError:
        return False
    return True


def _name_taken(message: str) -> ApiError:
    return ApiError(400, message, param="lora_name", code="name_taken")
