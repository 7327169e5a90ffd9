"""The cost model learns what it is shown, forgets no mode, and no outlier wrecks it."""

from __future__ import annotations

import json
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from peft_dist.core.cost_model import CostModel, CostPrior, OnlineRegression, StepFeatures
from peft_dist.core.errors import ConfigError
from peft_dist.core.step_costs import StepCosts
from peft_dist.placement.costs import ReplicaCosts

CPU = CostPrior(
    step=12e-3,
    decode_sequence=8e-4,
    prefill_token=1e-3,
    lora_step=6e-3,
    lora_token=1e-4,
    adapter=3e-4,
    rank_row_token=4e-6,
)
RANKS = (8, 16, 64)


def random_step(rng: random.Random, mode: str) -> StepFeatures:
    rows = []
    for _ in range(rng.randrange(1, 17)):
        adapter = rng.randrange(8)
        tokens = 1 if rng.random() < 0.9 else rng.randrange(8, 100)
        rows.append((f"a{adapter}", tokens, RANKS[adapter % 3]))
    if mode == "merged":
        return StepFeatures.of([("a1", tokens, 16) for _, tokens, _ in rows], "a1", 16)
    return StepFeatures.of(rows)


def error(model: CostModel, truth: CostModel, mode: str) -> float:
    """Mean relative error over fifty fresh steps."""
    rng = random.Random(99)
    steps = [random_step(rng, mode) for _ in range(50)]
    return sum(abs(model.step_seconds(s) / truth.step_seconds(s) - 1) for s in steps) / len(steps)


def teach(model: CostModel, truth: CostModel, mode: str, count: int, seed: int = 0, noise: float = 0.1) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        features = random_step(rng, mode)
        model.observe_step(features, truth.step_seconds(features) * rng.lognormvariate(0, noise))


def scaled(prior: CostPrior, factor: float) -> CostPrior:
    return CostPrior(**{n: getattr(prior, n) * factor for n in CPU.__slots__ if isinstance(getattr(prior, n), float)})


class TestFeatures:
    ROWS = (("a", 1, 16), ("a", 5, 16), ("b", 1, 8), ("", 1, 0))

    def test_unmerged_rows_of_adapters_cost_lora_and_those_of_the_base_do_not(self) -> None:
        assert StepFeatures.of(self.ROWS) == StepFeatures(False, 3, 5, 7, 2, 24, 6 * 16 + 8)

    def test_merged_rows_cost_no_lora(self) -> None:
        rows = [row for row in self.ROWS if row[0] == "a"]
        assert StepFeatures.of(rows, "a", 16) == StepFeatures(True, 1, 5)

    def test_others_in_a_merged_batch_pay_for_both_deltas_and_the_base_for_one(self) -> None:
        assert StepFeatures.of(self.ROWS, "a", 16) == StepFeatures(True, 3, 5, 2, 2, 24, 16 + 8 + 16)

    def test_regimes(self) -> None:
        batches = [(self.ROWS, None), ([("", 1, 0)], None), ([("a", 1, 16)], "a"), (self.ROWS, "a")]
        regimes = [StepFeatures.of(rows, merged, 16).regime for rows, merged in batches]
        assert regimes == ["unmerged", "base", "merged", "corrected"]


class TestLearning:
    def test_a_wrong_prior_is_soon_outvoted(self) -> None:
        model, truth = CostModel(), CostModel(CPU)
        assert error(model, truth, "unmerged") > 0.8
        teach(model, truth, "unmerged", 50)
        assert error(model, truth, "unmerged") < 0.06
        teach(model, truth, "unmerged", 400)
        assert error(model, truth, "unmerged") < 0.02

    def test_a_mode_is_remembered_while_another_one_lasts(self) -> None:
        model, truth = CostModel(), CostModel(CPU)
        teach(model, truth, "merged", 300)
        known = error(model, truth, "merged")
        teach(model, truth, "unmerged", 5000)
        assert error(model, truth, "unmerged") < 0.03
        assert error(model, truth, "merged") < known + 0.03

    def test_outliers_do_not_wreck_it(self) -> None:
        model, truth = CostModel(), CostModel(CPU)
        features = StepFeatures.of([("a", 1, 16)])
        model.observe_step(features, 60.0)  # The first step compiles.
        assert model.step_seconds(features) < 0.1
        teach(model, truth, "unmerged", 300)
        before = model.step_seconds(features)
        model.observe_step(features, 60.0)
        assert model.step_seconds(features) < 1.1 * before
        model.observe_step(features, 0.0)
        assert model.step_seconds(features) > 0.9 * before

    @pytest.mark.parametrize("factor", [0.25, 2.0, 10.0])
    def test_a_machine_that_changes_its_pace_does_so_in_every_mode(self, factor: float) -> None:
        model = CostModel()
        for mode in ("merged", "unmerged"):
            teach(model, CostModel(CPU), mode, 300)
        truth = CostModel(scaled(CPU, factor))
        teach(model, truth, "unmerged", 80)
        assert error(model, truth, "unmerged") < 0.3
        assert error(model, truth, "merged") < 0.4

    def test_a_merged_mode_that_is_slower_can_be_learned(self) -> None:
        truth = CostModel(CostPrior(step=0.01, merged_token=2e-3, lora_step=1e-3))
        model = CostModel()
        for mode in ("merged", "unmerged") * 2:
            teach(model, truth, mode, 200)
        rows = [("a", 1, 16)] * 8
        assert model.step_seconds(StepFeatures.of(rows, "a", 16)) > 1.3 * model.step_seconds(StepFeatures.of(rows))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["merged", "unmerged"]), st.floats(0, 10)), max_size=40), st.data())
    def test_predictions_are_never_negative_and_grow_with_every_feature(
        self, seen: list[tuple[str, float]], data: st.DataObject
    ) -> None:
        model, rng = CostModel(), random.Random(0)
        for mode, seconds in seen:
            model.observe_step(random_step(rng, mode), seconds)
        small = [data.draw(st.integers(0, 500)) for _ in range(6)]
        large = [n + data.draw(st.integers(0, 500)) for n in small]
        merged = data.draw(st.booleans())
        first = model.step_seconds(StepFeatures(merged, *small))
        assert 0 <= first <= model.step_seconds(StepFeatures(merged, *large)) + 1e-12

    def test_what_is_no_duration_is_refused(self) -> None:
        for value in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="duration"):
                CostModel().observe_step(StepFeatures(False, 1), value)
            with pytest.raises(ValueError, match="duration"):
                CostModel().observe_load(1, value)


class TestOtherWork:
    def test_switches(self) -> None:
        model = CostModel(CostPrior(merge=(0.01, 1e-4), unmerge=(0.003, 0.0)))
        assert model.switch_seconds("a", "a", 64) == model.switch_seconds(None, None) == 0
        assert model.switch_seconds(None, "a", 10) == pytest.approx(0.011)
        assert model.switch_seconds("a", None) == pytest.approx(0.003)
        assert model.switch_seconds("a", "b", 10) == pytest.approx(0.011), "no unmerge between"
        for _ in range(100):
            model.observe_switch("unmerge", 0.0)
            model.observe_switch("merge", 0.05, 64)
        assert model.switch_seconds("a", None) < 1e-4
        assert model.switch_seconds(None, "a", 64) == pytest.approx(0.05, rel=0.05)

    def test_one_merge_that_compiled_its_kernels_is_not_believed(self) -> None:
        """On a GPU without compiled kernels the first takes 0.9 s, and a replica that believes it merges no more."""
        model = CostModel(CostPrior(merge=(0.0115, 0.0)))
        model.observe_switch("merge", 0.9)
        assert model.switch_seconds(None, "a") == pytest.approx(0.0115)
        for _ in range(3):
            model.observe_switch("merge", 0.0118)
        model.observe_switch("merge", 0.5)
        assert model.switch_seconds(None, "a") == pytest.approx(0.0118, rel=0.02)

    def test_large_loads_between_small_ones_are_learnt(self) -> None:
        model = CostModel()
        for _ in range(20):
            model.observe_load(2 << 20, (2 << 20) * 1.7e-9)
            model.observe_load(168 << 20, (168 << 20) * 1.7e-9)
        assert model.load_seconds(168 << 20) == pytest.approx((168 << 20) * 1.7e-9, rel=0.1)

    def test_a_model_that_goes_on_elsewhere_doubts_what_it_doubted(self) -> None:
        model = CostModel(CostPrior(merge=(0.0115, 0.0)))
        model.observe_switch("merge", 0.9, 64)
        copy = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
        for each in (model, copy):
            each.observe_switch("merge", 0.9, 64)
        assert copy.to_dict() == model.to_dict() and copy.switch_seconds(None, "a", 64) > 0.1

    def test_what_takes_long_twice_running_takes_long(self) -> None:
        model = CostModel(CostPrior(merge=(0.0115, 0.0)))
        model.observe_switch("merge", 0.3)
        model.observe_switch("merge", 0.3)
        assert model.switch_seconds(None, "a") > 0.1
        model.observe_switch("merge", 0.3)
        assert model.switch_seconds(None, "a") == pytest.approx(0.3, rel=0.25)

    @pytest.mark.parametrize("name", ["load", "swap", "transfer"])
    def test_copies_are_affine_in_their_bytes(self, name: str) -> None:
        model, rng = CostModel(), random.Random(1)
        for _ in range(300):
            size = rng.randrange(10**6, 10**9)
            getattr(model, f"observe_{name}")(size, 2e-3 + size / 4e9)
        predict = getattr(model, f"{name}_seconds")
        assert predict(10**8) == pytest.approx(2e-3 + 10**8 / 4e9, rel=0.05)
        assert predict(8 * 10**8) == pytest.approx(2e-3 + 8 * 10**8 / 4e9, rel=0.05)


class TestProfiles:
    def test_the_papers(self) -> None:
        model = CostModel.paper()
        many, one = [("a", 1, 16)] * 16, [("a", 200, 64)]
        for rows in (many, one):
            assert model.step_seconds(StepFeatures.of(rows)) == pytest.approx(27e-3)
            assert model.step_seconds(StepFeatures.of(rows, "a", 16)) == pytest.approx(15e-3)
        assert model.switch_seconds(None, "a") == model.switch_seconds("a", None) == pytest.approx(20e-3)
        model.observe_step(StepFeatures.of(one), 9.0)
        model.observe_switch("merge", 9.0)
        assert model.step_seconds(StepFeatures.of(one)) == pytest.approx(27e-3), "it is fixed"
        assert model.switch_seconds(None, "a") == pytest.approx(20e-3)

    def test_a_profile_survives_json_and_goes_on_learning_alike(self) -> None:
        model, truth = CostModel(), CostModel(CPU)
        teach(model, truth, "unmerged", 60)
        model.observe_load(10**7, 0.5)
        copy = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
        for each in (model, copy):
            teach(each, truth, "merged", 10, seed=5)
        assert copy.to_dict() == model.to_dict()

    def test_broken_profiles_are_refused(self) -> None:
        good = CostModel().to_dict()
        with pytest.raises(ConfigError, match="format"):
            CostModel.from_dict({**good, "format": 99})
        for broken in ({"step": None}, {"load": {}}, {"prior": {"pace": 1.0}}, {"step": good["load"]}):
            with pytest.raises(ConfigError, match="measure it again"):
                CostModel.from_dict({**good, **broken})

    def test_priors_are_durations(self) -> None:
        for wrong in ({"step": -1.0}, {"load": (0.0, float("nan"))}):
            with pytest.raises(ConfigError, match="prior"):
                CostModel(CostPrior(**wrong))  # type: ignore[arg-type]

    def test_each_number_that_is_reported_is_what_it_is_called(self) -> None:
        model = CostModel()
        for _ in range(50):
            model.observe_load(10**7, 0.5)
            model.observe_transfer(10**7, 2.0)
        costs = StepCosts.of(model)
        assert costs.step == model.step_coefficients()
        assert (costs.load, costs.transfer) == (model.load_coefficients(), model.transfer_coefficients())
        assert costs.transfer_seconds(10**7) > 2 * costs.load_seconds(10**7) > 0.5
        assert costs.fetch == StepCosts().fetch, "nobody measures it"
        assert ReplicaCosts.of(costs, 1, {}, transfer=costs.transfer).transfer == costs.transfer

    def test_what_was_never_observed_keeps_its_prior(self) -> None:
        regression = OnlineRegression((1.0, 2.0), (1.0, 1.0), ("only",))
        for _ in range(500):
            regression.observe((1.0, 0.0), 3.0, "only")
        assert regression.predict((1.0, 0.0)) == pytest.approx(3.0, rel=0.01)
        assert regression.coefficients[1] >= 2.0, "known only to be no less when all else grew"
