"""Loads of adapters wait for their turn where only so many run at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peft_dist.core.errors import ConfigError
from peft_dist.sim.executor import SimExecutor
from peft_dist.sim.experiment import simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival

PLAIN = replace(CostProfile.load("paper-7b"))
COSTS = replace(PLAIN.costs, load=(0.5, 0.0))
SPECS = [PLAIN.adapter(f"a{index}", 16) for index in range(5)]


@pytest.mark.parametrize(
    ("at_once", "ends"), [(0, [0.5] * 5), (1, [0.5, 1.0, 1.5, 2.0, 2.5]), (2, [0.5, 0.5, 1.0, 1.0, 1.5])]
)
def test_a_load_begins_when_one_before_it_has_ended(at_once: int, ends: list[float]) -> None:
    now = 0.0
    truth = replace(PLAIN, costs=COSTS).truth()
    executor = SimExecutor(truth, lambda: now, 1, 0, loads_at_once=at_once)
    for slot, spec in enumerate(SPECS):
        executor.start_load(spec, slot)
    found: dict[int, tuple[float, float, float | None]] = {}
    while (end := executor.next_end()) is not None:
        now = end
        found |= {one.slot: (now, one.seconds, one.copy_seconds) for one in executor.take_loaded()}
    # What a load takes when it has its turn is what engines learn from.
    assert [found[slot] for slot in range(5)] == [(end, end, 0.5) for end in ends]
    now = 10.0
    executor.start_load(SPECS[0], 9)
    assert executor.next_end() == 10.5


@pytest.mark.parametrize("advance", [True, False])
def test_a_request_waits_for_adapters_before_its_own(advance: bool) -> None:
    def run(at_once: int) -> list[float]:
        profile = replace(PLAIN, costs=COSTS, loads_at_once=at_once)
        rows = [Arrival(0.0, f"a{index}", 4, 4) for index in range(4)]
        result = simulate(rows, profile, SimulationOptions(migration="rr", advance=advance))
        return [record.first_token or 0.0 for record in result.records]

    together, apart = run(0), run(1)
    assert max(together) < 0.7 and [int(2 * first) for first in apart] == [1, 2, 3, 4]


def test_the_number_comes_back_from_a_file(tmp_path: Path) -> None:
    profile = replace(PLAIN, loads_at_once=2)
    profile.dump(tmp_path / "mine.json")
    assert CostProfile.load(tmp_path / "mine.json") == profile
    PLAIN.dump(tmp_path / "old.json")
    assert "loads_at_once" not in (tmp_path / "old.json").read_text()
    with pytest.raises(ConfigError, match="loads_at_once"):
        replace(PLAIN, loads_at_once=-1)
