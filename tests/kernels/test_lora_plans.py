"""Launch plans: sane from the shape alone, better from a table, and found by measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_dist.kernels import lora_plans
from peft_dist.kernels.lora_plans import GroupPlan, GroupShape, default_plan, fit_plan, plan_for, rank_room

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


LLAMA = {
    "qkv": (4096, (4096, 1024, 1024)), "gate": (4096, (14336, 14336)), "o": (4096, (4096,)), "down": (14336, (4096,)),
}  # fmt: skip


def test_decode_steps_of_low_ranks_keep_the_plans_that_were_measured() -> None:
    """Of 32 adapters of ranks 8 and 16 on an H100: (parts of the inputs, outputs of the expand and of the gate)."""
    known = {
        16: {"qkv": (16, 256, 256), "gate": (16, 512, 256), "o": (16, 256, 256), "down": (14, 256, 256)},
        64: {"qkv": (8, 512, 256), "gate": (16, 2304, 1280), "o": (16, 256, 256), "down": (14, 256, 256)},
        256: {"qkv": (2, 512, 256), "gate": (4, 2304, 1280), "o": (6, 256, 256), "down": (7, 256, 256)},
    }
    for tiles, groups in known.items():
        for group, sizes in groups.items():
            plan = default_plan(GroupShape(16, tiles, *LLAMA[group], rank_room(16)))
            assert (plan.split, plan.loop_n, plan.gate_loop_n) == sizes, (tiles, group)
            assert (plan.block_k, plan.shrink_r, plan.shrink_warps, plan.shrink_stages) == (256, 16, 2, 3)
            assert (plan.loop_part, plan.loop_stages, plan.expand_warps, plan.gate_warps) == (128, 4, 4, 4)
            assert (plan.ranks, plan.rank_parts, plan.loop_shares, plan.gate_loop_shares) == (16, 1, 1, 1)


@pytest.mark.parametrize("tiles", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("sizes", [*LLAMA.values(), (40, (24, 33)), (4352, (4352,))])
@pytest.mark.parametrize("ranks", [32, 64, 128])
def test_programs_of_higher_ranks_read_about_as_much_each(
    tiles: int, sizes: tuple[int, tuple[int, ...]], ranks: int
) -> None:
    shape = GroupShape(16, tiles, *sizes, ranks)
    plan, few = default_plan(shape), default_plan(shape._replace(ranks=16))
    assert (plan.ranks, plan.rank_parts) == (ranks, ranks // 16) and plan.block_k == few.block_k
    part = -(-shape.in_features // (plan.split * plan.block_k)) * plan.block_k
    assert part * plan.split >= shape.in_features > part * (plan.split - 1), "the inputs are not covered once"
    assert plan.split <= min(few.split, 8)
    assert part <= max(8 * plan.block_k, -(-shape.in_features // 8) + plan.block_k)
    # No program reads more than two of 16 ranks do, or two blocks of outputs of the most ranks.
    for new, old, shares in (
        (plan.loop_n, few.loop_n, plan.loop_shares), (plan.gate_loop_n, few.gate_loop_n, plan.gate_loop_shares)
    ):  # fmt: skip
        assert new % (2 * plan.loop_part) == 0 and new * shares <= max(old, 2 * plan.loop_part)
        for rank in (16, ranks // 2, ranks):
            times = max(n for n in (1, 2, 4) if n <= shares and n * rank <= ranks)
            assert new * times * rank <= max(2 * old * 16, 2 * plan.loop_part * ranks)
    assert plan.in_float32().loop_n == 0 and plan.in_float32().split == plan.split


def test_launches_are_made_for_ranks_in_a_few_steps() -> None:
    assert [rank_room(rank) for rank in (1, 8, 16, 17, 32, 33, 64, 65, 128, 129, 512)] == [
        16, 16, 16, 32, 32, 64, 64, 128, 128, 128, 128,
    ]  # fmt: skip


def test_tiles_of_many_rows_know_no_ranks() -> None:
    prefill = SHAPE._replace(tile_rows=64)
    assert default_plan(prefill._replace(ranks=128)) == default_plan(prefill)


def test_a_table_of_other_ranks_says_nothing(folder: Path) -> None:
    high = SHAPE._replace(ranks=64)
    plans = {shape: replace(default_plan(shape), shrink_warps=1) for shape in (SHAPE, high)}
    path = folder / lora_plans.table_name(CARD)
    for measured, other in ((SHAPE, high), (high, SHAPE)):
        for cache in (lora_plans.tables_of, lora_plans.plan_for):
            cache.cache_clear()
        lora_plans.write_table(path, [(measured, plans[measured])], {})
        assert lora_plans.read_table(path) == {measured: plans[measured]}
        assert plan_for(measured, CARD) == plans[measured] and plan_for(other, CARD) == default_plan(other)
    # Tables from before plans went by ranks.
    path.write_text(path.read_text().replace("[4096, 1024, 1024], 64]", "[4096, 1024, 1024]]"))
    assert [*lora_plans.read_table(path)] == [SHAPE]


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


def test_prefills_have_as_much_in_work_as_the_card_has_room_for(folder: Path) -> None:
    prefill = SHAPE._replace(tile_rows=128)
    parts = {
        card: plan_for(prefill, card).loop_part for card in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA L40S")
    }
    assert parts == {"NVIDIA H100 80GB HBM3": 128, "NVIDIA H200": 128, "NVIDIA L40S": 64}
    assert plan_for(SHAPE, "NVIDIA H200") == default_plan(SHAPE)


@pytest.mark.parametrize("text", ["{", '{"lora": [{"shape": [1], "plan": {}}]}', '{"lora": [{"plan": {"fast": 1}}]}'])
def test_a_broken_table_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (folder / lora_plans.table_name(CARD)).write_text(text)
    assert plan_for(SHAPE, CARD) == default_plan(SHAPE)
    assert "is left out" in caplog.text


def test_shipped_tables_can_be_read() -> None:
    folder = Path(lora_plans.__file__).parent / "tuned"
    # Those of products have a test of their own.
    for path in {*folder.glob("*.json")} - {*folder.glob("products-*.json")}:
        for shape, plan in lora_plans.read_table(path).items():
            assert fit_plan(plan, shape) == plan, path.name


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 128])
@pytest.mark.parametrize("tiles", [1, 64])
def test_descending_finds_the_best_value_of_each_field(tiles: int, tile_rows: int, gate: bool) -> None:
    from peft_dist.kernels.lora_tune import descend, fields_of

    shape = GroupShape(tile_rows, tiles, 4096, (14336, 14336) if gate else (4096, 1024, 1024))
    start, fields = default_plan(shape), fields_of(shape, gate)
    wanted = {name: values[-1] for name, values in fields.items()}
    best = fit_plan(replace(start, **wanted), shape)
    measured: list[GroupPlan] = []

    def measure(plan: GroupPlan) -> float:
        measured.append(plan)
        return 10.0 + sum(getattr(plan, name) != getattr(best, name) for name in wanted)

    assert descend(shape, start, fields, measure, lambda: False) == best
    assert len(set(measured)) == len(measured) < 25
    # When time is up, what was found by then; the launch that is there is always measured.
    few: list[GroupPlan] = []
    found = descend(shape, start, fields, lambda plan: (few.append(plan), measure(plan))[1], lambda: len(few) > 3)
    assert few == measured[:4] and found in few


def test_plans_are_tuned_for_the_ranks_that_are_timed() -> None:
    from peft_dist.kernels.lora_tune import fields_of, shapes_of

    first, *others = shapes_of(4096, (4096,), 8, 8, 8192, 40)
    assert {(shape.tile_rows, shape.ranks) for shape in [first, *others]} == {(16, 64), (32, 16), (64, 16), (128, 16)}
    assert "loop_n" in fields_of(first, gate=False), "high ranks loop with one tile too"


class Bench:
    """In the place of a card: likes the widest loops best, and takes a second for each plan."""

    clock = 0.0

    def __init__(self, in_features: int, out_features: tuple[int, ...], rank: int, dtype: object) -> None:
        self.has_gate = len(out_features) == 2

    def measure(self, shape: GroupShape, plan: GroupPlan) -> float:
        Bench.clock += 1.0
        return 1e4 - plan.loop_n - plan.gate_loop_n


@pytest.mark.parametrize("seconds", [1e9, 10.0])
def test_tuning_writes_a_table_within_its_time(
    seconds: float, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from peft_dist.kernels import lora_bench
    from peft_dist.runner import tune as tuning

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)
    monkeypatch.setattr(tuning, "has_triton", lambda: True)
    monkeypatch.setattr(lora_bench, "GroupBench", Bench)
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: Bench.clock))
    Bench.clock = 0.0
    sizes = [(4096, (4096, 1024, 1024)), (4096, (14336, 14336))]
    path = tuning.tune(sizes, rank=16, max_loras=64, max_num_seqs=256, max_tokens=2048, seconds=seconds)
    assert path == folder / lora_plans.table_name(CARD)
    plans = lora_plans.read_table(path)
    first = [GroupShape(16, 64, *size) for size in sizes]
    assert list(plans)[:2] == first and (len(plans) == 16) == (seconds > 10)
    assert seconds > 10 or Bench.clock <= 11, "a plan that is measured when time is up is the last"
    assert all(plan_for(shape, CARD) == plan for shape, plan in plans.items())
    if seconds > 10:
        assert plans[first[0]].loop_n > default_plan(first[0]).loop_n
        assert plans[first[1]].gate_loop_n > default_plan(first[1]).gate_loop_n
    assert plans[first[1]].loop_n == default_plan(first[1]).loop_n, "nothing runs it"
    assert ("time is up" in caplog.text) == (len(plans) < 16)


def test_a_models_layers_are_grouped_as_they_are_launched() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_dist.runner.tune import group_sizes

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    assert group_sizes(LlamaForCausalLM(config)) == [(32, (32, 16, 16)), (32, (48, 48)), (32, (32,)), (48, (32,))]
