"""What moved, and how steps ran, while a run of bench_balance.py went on."""

from __future__ import annotations

import statistics
from typing import Any

from bench.balance_load import quantile
from peft_dist.orchestrator.observation import MovesView
from peft_dist.orchestrator.service import EngineService


class Moves:
    """A look at the service's counts, and what they are more later on."""

    def __init__(self, service: EngineService) -> None:
        self._service = service
        self._before, self._placements = self._look()
        self._counts = self._steps()

    def since(self) -> dict[str, Any]:
        """For results. A move with KV takes from when the source was asked to when the target runs the request."""
        live, placements = self._look()
        ways, before = live.by_way(), self._before.by_way()
        with_kv = ways.get("kv", 0) - before.get("kv", 0)
        seconds = self._service._core.handover.latest_seconds(with_kv)
        told: dict[str, Any] = {
            "moved_with_kv": with_kv,
            "moved_computed_again": ways.get("recompute", 0) - before.get("recompute", 0),
            "moves_failed": _failed(live) - _failed(self._before),
            "moved_bytes": {
                memory: number - self._before.num_bytes.get(memory, 0) for memory, number in live.num_bytes.items()
            },
            "placements": placements - self._placements,
            **{name: count - self._counts[name] for name, count in self._steps().items()},
        }
        if seconds:
            told["move_mean_ms"] = round(1e3 * statistics.fmean(seconds), 2)
            told["move_p90_ms"] = round(1e3 * quantile(seconds, 0.9), 2)
        return told

    def _steps(self) -> dict[str, int]:
        """Of all replicas, as they last told: a few of the latest steps may be missing."""
        totals = [replica.totals for replica in self._service.replicas()]
        return {
            "steps": sum(one.num_merged_steps + one.num_unmerged_steps for one in totals),
            "merged_steps": sum(one.num_merged_steps for one in totals),
            "switches": sum(one.num_switches for one in totals),
        }

    def _look(self) -> tuple[MovesView, int]:
        view = self._service.migration()
        return (MovesView(), 0) if view is None else (view.live, view.num_placements)


def _failed(view: MovesView) -> int:
    """Requests that were to move with their KV, and did not though they had not ended."""
    return sum(n for (_, way, end), n in view.ends.items() if way == "kv" and end not in ("moved", "ended"))
