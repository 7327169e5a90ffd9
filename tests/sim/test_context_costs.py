"""A decode takes longer the more tokens its sequence has in the KV cache, where a profile says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.errors import ConfigError
from peft_dist.sim.executor import SimExecutor
from peft_dist.sim.experiment import simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival

PLAIN = replace(CostProfile.load("paper-7b"), host_seconds=0.0)
TOKEN, CONTEXT = 1e-5, 100.0
LONGER = replace(PLAIN, context_token=TOKEN, context=CONTEXT)


@pytest.mark.parametrize(
    ("decodes", "prompts", "cached"), [(1, 0, 100), (4, 0, 30), (4, 0, 4000), (3, 50, 900), (0, 50, 0)]
)
def test_a_step_takes_its_context_more_or_less(decodes: int, prompts: int, cached: int) -> None:
    plain, longer = (
        SimExecutor(profile.truth(), lambda: 0.0, 1, 0, context_token=profile.context_token, context=profile.context)
        for profile in (PLAIN, LONGER)
    )
    features = StepFeatures(False, decodes, prompts)
    added = longer.step_seconds(features, cached) - plain.step_seconds(features, cached)
    assert added == pytest.approx(TOKEN * (cached - CONTEXT * decodes), abs=1e-12)


def test_no_step_takes_less_than_nothing() -> None:
    executor = SimExecutor(PLAIN.truth(), lambda: 0.0, 1, 0, context_token=1.0, context=1e3)
    assert executor.step_seconds(StepFeatures(False, 1), 3) == 0.0


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("advance", [True, False])
def test_tokens_come_later_the_more_there_are(depth: int, advance: bool) -> None:
    options = SimulationOptions(adapters=("a",), depth=depth, advance=advance)

    def gaps(profile: CostProfile) -> list[float]:
        [record] = simulate([Arrival(0.0, "a", 40, 80)], profile, options).records
        return list(record.itl)

    plain, longer = gaps(PLAIN), gaps(LONGER)
    # The first decode has the prompt's tokens in the cache.
    expected = [before + TOKEN * (40 + number - CONTEXT) for number, before in enumerate(plain)]
    assert longer == pytest.approx(expected, abs=1e-9)


def test_it_comes_back_from_a_file_and_is_not_in_files_without_it(tmp_path: Path) -> None:
    LONGER.dump(tmp_path / "mine.json")
    assert CostProfile.load(tmp_path / "mine.json") == LONGER
    PLAIN.dump(tmp_path / "plain.json")
    assert '"context' not in (tmp_path / "plain.json").read_text()


@pytest.mark.parametrize("wrong", [{"context_token": -1e-6}, {"context": float("nan")}])
def test_what_is_no_cost_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be 0 or more"):
        replace(PLAIN, **wrong)
