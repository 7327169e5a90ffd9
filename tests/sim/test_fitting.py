"""Costs are found from the seconds that they bring, and no cost is below zero."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from peft_dist.core.cost_model import STEP_TERMS, CostModel, CostPrior, StepFeatures
from peft_dist.sim.fitting import fit_line, fit_steps, mean_error, medians, nonnegative

RESULTS = Path(__file__).parents[2] / "docs" / "results"

TRUTH = CostPrior(
    step=0.02, decode_sequence=1e-3, prefill_token=5e-4, merged_step=2e-3, merged_token=1e-4, lora_step=3e-3,
    lora_token=2e-4, adapter=1e-3,
)  # fmt: skip


def steps(noise: float = 0.0) -> list[tuple[StepFeatures, float]]:
    """Every batch three times; each third measurement of a batch is an outlier where there is noise."""
    rng, model, found = random.Random(0), CostModel(TRUTH, fixed=True), []
    for merged in (False, True):
        for decodes in (0, 1, 4, 16):
            for prefill in (0, 32, 200):
                for adapters in (0,) if merged else (0, 1, min(decodes, 4)):
                    tokens = decodes + prefill if adapters else 0
                    features = StepFeatures(merged, decodes, prefill, tokens, adapters, 16 * adapters, 16 * tokens)
                    seconds = model.step_seconds(features)
                    off = [1 + noise * rng.uniform(-1, 1), 1 + noise * rng.uniform(-1, 1), 5.0 if noise else 1.0]
                    found += [(features, seconds * factor) for factor in off]
    return found


def test_exact_seconds_give_the_costs_back() -> None:
    found = fit_steps(steps())
    for name, value in found.items():
        assert value == pytest.approx(getattr(TRUTH, name), rel=1e-2, abs=1e-7), name
    assert mean_error(found, steps()) < 1e-3


def test_noise_and_outliers_hardly_matter() -> None:
    assert mean_error(fit_steps(steps(noise=0.05)), steps()) < 0.05


def test_the_distance_is_that_of_the_medians() -> None:
    """An outlier among equal steps is no distance of the fit's."""
    one, other = StepFeatures(False, 1), StepFeatures(False, 2)
    costs = dict.fromkeys(STEP_TERMS, 0.0) | {"step": 1.0}
    assert mean_error(costs, [(one, 1.0), (one, 1.0), (one, 0.01), (other, 2.0)]) == pytest.approx(0.25)
    assert medians([(one, 3.0), (other, 2.0), (one, 1.0), (one, 2.0)]) == [(one, 3, 2.0), (other, 1, 2.0)]


def test_the_terms_are_enough_for_measured_steps_of_a_gpu() -> None:
    """Decode steps of 1 to 256 rows and up to 32 adapters, and short prompts, 8B on an H100 (docs/results/gpu.json)."""
    rows = json.loads((RESULTS / "gpu.json").read_text())["figures"]["measurements"]
    known = [row for row in rows if (row.get("engine"), row.get("shape"), row.get("part")) == ("ours", "8b", "decode")]
    found = []
    for row in known:
        if row["mode"] == "merged":
            continue
        size, adapters, rank = row["batch"], row["distinct"], 16 * 224
        for tokens, milliseconds in ((0, row["step_ms"]), (128 * size, row["prefill_ms"])):
            if tokens <= 1024:  # Of more, prompts take several steps.
                lora = (tokens or size) if adapters else 0
                features = StepFeatures(
                    False, 0 if tokens else size, tokens, lora, adapters, rank * adapters, rank * lora
                )
                found.append((features, milliseconds / 1e3))
    costs = fit_steps(found)
    for regime in ("base", "unmerged"):
        own = [pair for pair in found if pair[0].regime == regime]
        assert len(own) >= 8 and mean_error(costs, own) < 0.06


def test_what_would_be_negative_is_zero() -> None:
    """Seconds fall with the second feature: it costs nothing."""
    assert nonnegative([[1, 0], [1, 1], [1, 2]], [3.0, 2.0, 1.0])[1] == 0.0


def test_a_line_needs_two_sizes_for_its_fixed_part() -> None:
    assert fit_line([(10, 1.2), (20, 2.2), (40, 4.2)]) == pytest.approx((0.2, 0.1), rel=1e-3)
    assert fit_line([(10, 1.0), (10, 3.0), (10, 1.0)]) == pytest.approx((0.0, 0.1), rel=1e-3)
    assert fit_line([(0, 0.5), (0, 0.7), (0, 0.5)])[0] == pytest.approx(0.5, rel=1e-3)
    assert fit_line([]) == (0.0, 0.0)
