"""Launch plans: sane from the shape alone, better from a table, and found by measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from peft_dist.kernels import lora_plans
from peft_dist.kernels.lora_plans import GroupPlan, GroupShape, default_plan, fit_plan, plan_for

CARD = "Imaginary GPU (80 GB)"
SHAPE = GroupShape(16, 32, 4096, (4096, 1024, 1024))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(lora_plans.FOLDER_VARIABLE, str(tmp_path))
    caches = (lora_plans.tables_of, lora_plans.plan_for)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("tiles", [1, 2, 32, 64, 1024])
@pytest.mark.parametrize("sizes", [(4096, (4096, 1024, 1024)), (14336, (4096,)), (40, (24, 33)), (1, (1,))])
def test_default_plans_cover_the_inputs_once(tile_rows: int, tiles: int, sizes: tuple[int, tuple[int, ...]]) -> None:
    shape = GroupShape(tile_rows, tiles, *sizes)
    for plan in (default_plan(shape), default_plan(shape).in_float32()):
        part = -(-shape.in_features // (plan.split * plan.block_k)) * plan.block_k
        assert part * plan.split >= shape.in_features
        for size in (plan.block_k, plan.block_n, plan.part_n, plan.shrink_r, plan.gate_n, plan.gate_part_n):
            assert size >= 16 and size & (size - 1) == 0
    plan = default_plan(shape)
    part = -(-shape.in_features // (plan.split * plan.block_k)) * plan.block_k
    assert part * (plan.split - 1) < shape.in_features, "a part of the sum is empty"


def test_a_plan_of_a_similar_shape_is_fitted() -> None:
    plan = GroupPlan(block_k=512, split=16, block_n=256)
    fitted = fit_plan(plan, GroupShape(16, 1, 700, (40,)))
    assert (fitted.block_k, fitted.split, fitted.block_n) == (512, 2, 64)


def test_the_nearest_measured_shape_decides(folder: Path) -> None:
    few, many = GroupPlan(128, 32, 32), GroupPlan(256, 4, 256, pdl=True)
    path = folder / "imaginary-gpu-80-gb.json"
    assert lora_plans.table_name(CARD) == path.name
    lora_plans.write_table(path, [(SHAPE._replace(max_tiles=1), few), (SHAPE, many)], {"device": CARD})
    assert lora_plans.read_table(path) == {SHAPE._replace(max_tiles=1): few, SHAPE: many}
    assert plan_for(SHAPE, CARD) == many
    assert plan_for(SHAPE._replace(max_tiles=2), CARD) == few
    assert plan_for(SHAPE._replace(in_features=5120, out_features=(5120, 1024, 1024)), CARD).pdl
    # Of what nothing near was measured, and on other cards, the shape decides.
    for shape, card in (
        (SHAPE._replace(tile_rows=64), CARD),
        (SHAPE._replace(out_features=(4096,)), CARD),
        (SHAPE._replace(in_features=64, out_features=(64, 64, 64)), CARD),
        (SHAPE, "Another GPU"),
    ):
        assert plan_for(shape, card) == default_plan(shape)


@pytest.mark.parametrize("text", ["{", '{"lora": [{"shape": [1], "plan": {}}]}', '{"lora": [{"plan": {"fast": 1}}]}'])
def test_a_broken_table_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (folder / lora_plans.table_name(CARD)).write_text(text)
    assert plan_for(SHAPE, CARD) == default_plan(SHAPE)
    assert "is left out" in caplog.text


def test_shipped_tables_can_be_read() -> None:
    shipped = list((Path(lora_plans.__file__).parent / "tuned").glob("*.json"))
    for path in shipped:
        for shape, plan in lora_plans.read_table(path).items():
            assert fit_plan(plan, shape) == plan, path.name


def test_descending_finds_the_best_value_of_each_field() -> None:
    from peft_dist.kernels.lora_tune import descend, fields_of

    wanted = {"split": 8, "block_k": 256, "shrink_warps": 2, "block_n": 128, "pdl": True}
    measured: list[GroupPlan] = []

    def measure(plan: GroupPlan) -> float:
        measured.append(plan)
        return 10.0 + sum(getattr(plan, name) != value for name, value in wanted.items())

    start = GroupPlan(128, 2, 64)
    best = descend(SHAPE, start, fields_of(SHAPE, gate=False), measure)
    assert best == replace(start, **wanted)
    assert len(set(measured)) == len(measured) < 40


def test_a_models_layers_are_grouped_as_they_are_launched() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_dist.runner.tune import group_sizes

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    assert group_sizes(LlamaForCausalLM(config)) == [(32, (32, 16, 16)), (32, (48, 48)), (32, (32,)), (48, (32,))]
