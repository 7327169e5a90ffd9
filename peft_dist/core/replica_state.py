"""What a replica tells of itself."""

from __future__ import annotations

import msgspec

from peft_dist.core.step_costs import StepCosts


class ReplicaStats(msgspec.Struct, frozen=True):
    """A replica's state after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    resident_adapters: list[str] = []


class AdapterResidency(msgspec.Struct, frozen=True):
    """Where one adapter's weights are: tier "device", "host" or "disk". ``rank`` is the largest of its modules."""

    content_hash: str
    tier: str
    rank: int
    num_bytes: int


class ReplicaDetail(msgspec.Struct, frozen=True):
    """What only people watching a replica want to know; sent about once a second while it works.

    Counts by adapter are keyed by content hash, "" for the base. ``policy`` are the batching policy's own numbers,
    ``credits`` its credit of each adapter. Seconds as floats. ``peak_memory_bytes``: Of its device's memory, at most.
    """

    merged_adapter: str | None = None
    num_steps: int = 0
    num_merged_steps: int = 0
    num_switches: int = 0
    switch_seconds: float = 0.0
    waiting: dict[str, int] = {}
    running: dict[str, int] = {}
    policy: dict[str, float] = {}
    credits: dict[str, float] = {}
    adapters: list[AdapterResidency] = []
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0
    peak_memory_bytes: int = 0
    costs: StepCosts | None = None
