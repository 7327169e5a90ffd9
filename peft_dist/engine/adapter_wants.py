"""Which adapters of queued requests are to be on the device."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from peft_dist.core.request import Request
from peft_dist.engine.adapter_manager import AdapterManager


def want_adapters(queue: Collection[Request], adapters: AdapterManager, max_wait: float, now: float) -> None:
    """Have the adapters of queued requests loaded, that of the oldest first.

    Those on the device stay there while anybody in the queue needs them, unless a request has not run for longer than
    ``max_wait`` seconds because its own is not there: for that one all are given up that no elder needs. Pinned ones
    stay in any case, and are fetched before those of requests that are in time.

    Args:
        queue: Unfinished requests, oldest first.
    """
    if not adapters.pins.unmet and _are_held(queue, adapters):
        return
    oldest: dict[str, Request] = {}
    for request in queue:
        if request.adapter is not None:
            oldest.setdefault(request.content_hash, request)
    specs = [request.adapter for request in oldest.values() if request.adapter is not None]
    for index, (content_hash, request) in enumerate(oldest.items()):
        last = request.arrival_time if request.last_scheduled is None else request.last_scheduled
        if now - last > max_wait and not adapters.is_held(content_hash):
            adapters.want(specs[: index + 1], spared=list(oldest)[: index + 1])
            break
    adapters.want_pinned()
    adapters.want(specs)


def _are_held(queue: Iterable[Request], adapters: AdapterManager) -> bool:
    """Whether every adapter of these requests is on the device or on its way there."""
    on_device = adapters.on_device
    for request in queue:
        adapter = request.adapter
        if adapter is not None and adapter.content_hash not in on_device and not adapters.is_held(adapter.content_hash):
            return False
    return True
