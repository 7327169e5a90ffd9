"""The adapters that ``peft-dist serve`` begins with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from peft_dist.core.errors import AdapterError

if TYPE_CHECKING:
    from peft_dist.cli_serve import ServeSettings
    from peft_dist.orchestrator.service import EngineService

logger = logging.getLogger("peft_dist.serve")


async def load_all(settings: ServeSettings, service: EngineService) -> list[str]:
    """Load what was named, and what is in the adapter folder, of which any may be refused but those to be pinned.

    Returns:
        Names of what was refused.

    Raises:
        AdapterError: one that was named is refused.
    """
    refused = []
    for name, path in settings.adapters:
        await _load(settings, service, name, path, allow_hub=True)
    folder = settings.http.adapter_dir
    for weights in [] if folder is None else sorted(folder.glob("*/adapter_model.*")):
        if not (weights.parent / "adapter_config.json").exists():
            logger.error("Not served: %s has no adapter_config.json beside %s", weights.parent, weights.name)
            refused.append(weights.parent.name)
    for name, root in of_folder(settings):
        try:
            await _load(settings, service, name, name, root=root)
        except AdapterError as error:
            if name in settings.engine.pinned_adapters:
                raise
            logger.error("Not served: %s", error)
            refused.append(name)
    return refused


def of_folder(settings: ServeSettings) -> list[tuple[str, str]]:
    """Names of the adapters in the adapter folder that were not named by themselves, each with that folder."""
    folder = settings.http.adapter_dir
    if folder is None:
        return []
    given = {name for name, _ in settings.adapters}
    found = [config.parent.name for config in sorted(folder.glob("*/adapter_config.json"))]
    return [(name, str(folder)) for name in found if name not in given]


async def _load(settings: ServeSettings, service: EngineService, name: str, path: str, **source: Any) -> None:
    """Load an adapter that was given at the start, unless replicas have it from an earlier life."""
    source |= {"allow_pickle": settings.http.allow_pickle, "pinned": name in settings.engine.pinned_adapters}
    if not service.has_adapter(name, path, **source):
        was_served = any(spec.name == name for spec in service.adapters())
        await service.load_adapter(name, path, replace=was_served, **source)
