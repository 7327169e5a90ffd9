"""Steps take as long as the captured size that they run in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.errors import ConfigError
from peft_dist.sim.executor import SimExecutor
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival

PLAIN = CostProfile.load("paper-7b")
CAPTURED = replace(PLAIN, prompt_sizes=(64, 128))


@pytest.mark.parametrize(
    ("decodes", "prompts", "more"),
    [(0, 40, 24), (0, 64, 0), (20, 60, 48), (28, 100, 0), (8, 300, 0), (20, 0, 0)],
)
def test_a_step_computes_what_the_size_above_it_does(decodes: int, prompts: int, more: int) -> None:
    plain, captured = (
        SimExecutor(profile.truth(), lambda: 0.0, 1, 0, prompt_sizes=profile.prompt_sizes)
        for profile in (PLAIN, CAPTURED)
    )
    features = StepFeatures(False, decodes, prompts)
    added = captured.step_seconds(features) - plain.step_seconds(features)
    assert added == pytest.approx(more * PLAIN.costs.prefill_token, abs=1e-12)


@pytest.mark.parametrize(("decodes", "prompts", "more"), [(1, 0, 0), (5, 0, 3), (8, 0, 0), (9, 0, 0), (5, 3, 0)])
@pytest.mark.parametrize("context", [0.0, 100.0])
def test_a_decode_computes_rows_that_have_no_context(decodes: int, prompts: int, more: int, context: float) -> None:
    plain, captured = (
        SimExecutor(PLAIN.truth(), lambda: 0.0, 1, 0, decode_sizes=sizes, context_token=1e-6, context=context)
        for sizes in ((), (1, 2, 8))
    )
    features = StepFeatures(False, decodes, prompts, decodes, 1)
    added = captured.step_seconds(features, 300) - plain.step_seconds(features, 300)
    # The profile's decodes have some, of which its cost of a decode has a part.
    row = PLAIN.costs.decode_sequence - 1e-6 * context
    assert added == pytest.approx(more * row, abs=1e-12)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("advance", [True, False])
def test_three_requests_decode_as_four_do(depth: int, advance: bool) -> None:
    def run(count: int, sizes: tuple[int, ...]) -> list[float]:
        options = SimulationOptions(adapters=("a",), depth=depth, advance=advance)
        load = [Arrival(0.0, "a", 40, 8) for _ in range(count)]
        records = simulate(load, replace(PLAIN, decode_sizes=sizes), options).records
        assert all(record.first_token is not None for record in records)
        return [record.finished - (record.first_token or 0.0) for record in records]

    more = 7 * PLAIN.costs.decode_sequence
    assert run(3, (4,)) == pytest.approx([took + more for took in run(3, ())], abs=1e-9)
    assert run(4, (4,)) == pytest.approx(run(4, ()), abs=1e-12)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("advance", [True, False])
def test_a_request_waits_for_the_padding_of_its_prompt(depth: int, advance: bool) -> None:
    def run(profile: CostProfile) -> SimulationResult:
        options = SimulationOptions(adapters=("a",), depth=depth, advance=advance)
        return simulate([Arrival(0.0, "a", 40, 8)], profile, options)

    [plain], [captured] = run(PLAIN).records, run(CAPTURED).records
    assert plain.first_token is not None and captured.first_token is not None
    more = 24 * PLAIN.costs.prefill_token
    assert captured.first_token - plain.first_token == pytest.approx(more, abs=1e-9)
    # Decodes have sizes of their own, which were measured as they are.
    assert captured.finished - plain.finished == pytest.approx(more, abs=1e-9)


def test_sizes_come_back_from_a_file(tmp_path: Path) -> None:
    mine = replace(CAPTURED, decode_sizes=(1, 2, 8))
    mine.dump(tmp_path / "mine.json")
    assert CostProfile.load(tmp_path / "mine.json") == mine


@pytest.mark.parametrize("name", ["prompt_sizes", "decode_sizes"])
@pytest.mark.parametrize("sizes", [(0, 64), (128, 64), (64, 64), (64.0,)])
def test_sizes_that_are_not_in_order_are_refused(name: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(PLAIN, **{name: sizes})  # type: ignore[arg-type]
