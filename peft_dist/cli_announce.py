"""What ``peft-dist serve`` says of itself when it starts, and once it serves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_dist.cli_serve import ServeSettings
    from peft_dist.orchestrator.service import EngineService
    from peft_dist.worker.state_folder import StateFolder

logger = logging.getLogger("peft_dist.serve")


def tell_of_the_start(service: EngineService, settings: ServeSettings) -> None:
    """Nobody can join at an address that is told only once somebody has joined."""
    if settings.num_replicas:
        logger.info("Loading   %s", settings.engine.model)
    if service.guests is not None:
        reach = "" if settings.cluster_key else " (this machine only)"
        waits = "" if settings.num_replicas else ": waiting for peft-dist worker --join"
        logger.info("Joining   %s%s%s", service.guests.endpoint, reach, waits)


def announce(service: EngineService, settings: ServeSettings, url: str, state: StateFolder | None) -> None:
    """Everything that was chosen, and where requests go."""
    model = service.model
    adapters = ", ".join(f"{spec.name} (rank {spec.max_rank})" for spec in service.adapters()) or "none"
    tokens = model.num_blocks * model.block_size
    again = "" if settings.restart else "not "
    logger.info("Replicas  %d, %sstarted again when they die", settings.num_replicas, again)
    if state is not None:
        logger.info("State     %s: workers wait %g s for the next server", state.path, settings.orphan_timeout)
    if settings.num_replicas > 1 or settings.listen is not None:
        logger.info("Migration %s, plans within %.0f ms", settings.migration, 1e3 * settings.planner_limit)
    logger.info("Model     %s as %r, %s in %s", model.model, model.served_model_name, model.device, model.dtype)
    logger.info("Back ends attention %s, LoRA %s, depth %d", model.attention_backend, model.lora_backend, model.depth)
    logger.info("Merging   %s, second copies of %.0f MiB", model.merge_way, model.merge_bytes / 2**20)
    logger.info("KV cache  %d blocks of %d = %d tokens", model.num_blocks, model.block_size, tokens)
    logger.info("Limits    %d tokens a request, %d waiting sequences", model.max_model_len, settings.max_queue)
    logger.info("Adapters  %s", adapters)
    logger.info("Pinned    %s", ", ".join(sorted(service.pinned_adapters())) or "none")
    logger.info("API keys  %s", "asked for" if settings.http.api_keys else "none: whoever reaches the port is served")
    logger.info("Serving   %s/v1", url)
