"""Kernels that steps with adapters launch operator by operator are all compiled before the first such step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_dist import LLM
from peft_dist.core.batch import NO_ADAPTER, Batch, ScheduledSequence, SequenceStart
from peft_dist.core.config import EngineConfig
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.kernels.lora_plans import GroupShape, default_plan, tile_count
from peft_dist.kernels.lora_tiles import TILE_ROWS
from peft_dist.patches import fuse
from peft_dist.runner import replica as replicas
from peft_dist.runner import warm_up
from peft_dist.runner.adapter_memory import expect_workspace
from peft_dist.runner.model_runner import ModelRunner
from peft_dist.runner.step_variants import MOST_MIXED_TOKENS
from peft_dist.runner.warm_up import KernelWarmUp, rehearsals
from tests.launches import Key, note_launches
from tests.tiny_models import make_model, random_adapter

TOKENS, SEQS, LORAS, BLOCK, LONGEST = 2048, 96, 64, 16, 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LLM, list[Key]]]:
    """A fused model with adapters of some and of all its layers, as on a GPU, and what it launches."""
    if torch.cuda.is_available():
        pytest.skip("launches are noted in the place of Triton's interpreter")
    monkeypatch.setattr(replicas, "prepare_layers", lambda model, config: fuse(model, "triton"))
    model = make_model("llama", tmp_path / "base")
    adapters = {
        "all": random_adapter(model, tmp_path / "all", 4, 8.0, LINEARS, seed=1),
        "some": random_adapter(model, tmp_path / "some", 4, 8.0, ["q_proj", "v_proj"], seed=2),
    }
    seen = note_launches(monkeypatch)
    with LLM(
        tmp_path / "base", adapters, device="cpu", dtype="bfloat16", attention_backend="triton", pack_weights=False,
        num_blocks=LONGEST // BLOCK, max_model_len=LONGEST, max_num_seqs=SEQS, max_num_batched_tokens=TOKENS,
        max_loras=LORAS, block_size=BLOCK,
    ) as llm:  # fmt: skip
        llm._open.runner.lora_backend = "triton"
        yield llm, seen


def any_lengths(random: np.random.Generator, least: int) -> list[int]:
    """Of a batch of ``least`` to ``TOKENS`` tokens: many short sequences, a few long ones, decodes among them."""
    typical, share = random.choice([2, 12, 40, 70, 130, 200]), random.choice([0.0, 0.3, 1.0])
    while True:
        count = int(random.integers(1, SEQS + 1))
        lengths = np.minimum(random.geometric(1 / typical, count), LONGEST - 1)
        lengths[random.random(count) < share] = 1
        kept = lengths[: np.searchsorted(np.cumsum(lengths), TOKENS, side="right")].tolist()
        if kept and sum(kept) >= least:
            return kept
        # Too few: longer ones.
        typical, share = min(2 * typical, 200), share / 2


def run_batch(runner: ModelRunner, lengths: list[int], slots: list[int], merged_slot: int = NO_ADAPTER) -> None:
    names = [f"s{i}" for i in range(len(lengths))]
    greedy = SamplingParams(temperature=0.0)
    starts = [SequenceStart(name, [5] * n, [], greedy, 0, 0) for name, n in zip(names, lengths, strict=True)]
    sequences = [
        ScheduledSequence(name, [5] * n, 0, [i % 7] * -(-n // BLOCK), adapter_slot=slot, samples=True)
        for i, (name, n, slot) in enumerate(zip(names, lengths, slots, strict=True))
    ]
    runner.finish(runner.start(Batch(0, sequences, starts, merged_slot=merged_slot)))
    for name in names:
        runner.forget(name)


def any_batch(runner: ModelRunner, random: np.random.Generator, least: int, minority: bool) -> None:
    lengths = any_lengths(random, least)
    several = random.integers(-1, random.choice([1, 8, LORAS]), len(lengths))
    slots = np.where(random.random(len(lengths)) < random.choice([0.0, 0.5]), NO_ADAPTER, several)
    if (slots < 0).all():
        slots[0] = 0
    run_batch(
        runner, lengths, slots.tolist(), merged_slot=int(random.choice([NO_ADAPTER, 3])) if minority else NO_ADAPTER
    )


@pytest.mark.parametrize(("captured", "minority"), [(True, False), (True, True), (False, True)])
def test_no_batch_launches_what_the_rehearsals_did_not(
    captured: bool, minority: bool, noted: tuple[LLM, list[Key]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``captured``: batches of up to MOST_MIXED_TOKENS are not run, and attention's kernels had their graphs."""
    monkeypatch.setattr(warm_up, "MOST_MIXED_TOKENS", 1024)
    llm, seen = noted
    runner = llm._open.runner
    kernels = KernelWarmUp(runner, replace(llm._open.config, merged_minority=minority), LONGEST)
    assert seen == []
    if captured:
        runner.graphs = object()  # type: ignore[assignment]
    kernels.begin()
    runner.graphs = None
    kernels.finish()
    known = set(seen)
    lora = {key for key in known if "lora" in key.kernel}
    assert lora
    random = np.random.default_rng(3)
    for _ in range(60):
        seen.clear()
        any_batch(runner, random, 1025 if captured else 1, minority)
        launched = {key for key in seen if "lora" in key.kernel or not captured}
        assert {key for key in launched if "lora" in key.kernel}
        assert launched <= known, Counter(key.kernel for key in launched - known)


def test_what_is_left_for_adapters_is_enough_for_the_largest_batches(noted: tuple[LLM, list[Key]]) -> None:
    """KV blocks are counted before any adapter is there, by a batch of the base alone."""
    llm, _ = noted
    runner = llm._open.runner
    workspace = runner.store.pool.workspace
    left = expect_workspace(llm._open.config, runner.store._modules, runner.store.pool)
    assert left == workspace.bytes_with(256) and workspace.num_bytes == 0
    workspace.per_rank = 0
    random = np.random.default_rng(5)
    for _ in range(20):
        any_batch(runner, random, TOKENS // 2, minority=True)
        assert 0 < workspace.num_bytes <= left


def test_a_rehearsal_leaves_no_trace(noted: tuple[LLM, list[Key]]) -> None:
    """It may come while requests are under way: their cache, draws and records are what they were."""
    llm, _ = noted
    runner = llm._open.runner
    caches = [tensor for cache in runner.kv.caches for tensor in cache]
    for tensor in caches:
        tensor.fill_(7.0)
    before, first = runner.drawn.tokens.clone(), runner.drawn.begin()
    metadata = []
    forward = runner._logits
    runner._logits = lambda inputs: (metadata.append(inputs.attention), forward(inputs))[1]  # type: ignore[method-assign]
    runner.rehearse([40, 3, 1], 32)
    assert (metadata[0].slot_mapping_t == -1).all() and len(metadata[0].slot_mapping_t) == 44
    assert all((tensor == 7.0).all() for tensor in caches)
    assert torch.equal(runner.drawn.tokens, before) and not runner.records
    assert runner.drawn.begin() == first + runner.drawn.max_rows, "it took no step's place"


def test_layers_that_get_adapters_later_are_rehearsed_then(noted: tuple[LLM, list[Key]], tmp_path: Path) -> None:
    llm, seen = noted
    open_ = llm._open
    assert not open_.warm_up_some(), "nothing is of use where LoRA runs by another back end"
    model = make_model("llama", tmp_path / "again")
    deeper = random_adapter(model, tmp_path / "deeper", 4, 8.0, [*LINEARS, "lm_head"], seed=3)
    llm.load_adapter(random_adapter(model, tmp_path / "same", 4, 8.0, LINEARS, seed=4), "same")
    assert seen == []
    open_.load_adapter("deeper", deeper)
    count = 0
    while open_.warm_up_some():
        count += 1
        assert len(seen) > 0
        seen.clear()
    config = open_.config
    assert count == len(list(rehearsals(config, LONGEST, captured=False)))
    llm.load_adapter(random_adapter(model, tmp_path / "tables", 4, 8.0, ["embed_tokens"], seed=5), "tables")
    assert seen and not open_.warm_up_some(), "an LLM has nobody waiting, and warms up at once"


@pytest.mark.parametrize("off", [{"exec_type": "peft"}, {"policy": "merge"}, {"backend": "torch"}])
def test_replicas_that_run_no_adapters_rehearse_nothing(off: dict[str, str], noted: tuple[LLM, list[Key]]) -> None:
    runner = noted[0]._open.runner
    runner.attention_backend = off.get("backend", "triton")
    options = {name: value for name, value in off.items() if name != "backend"}
    kernels = KernelWarmUp(runner, EngineConfig("m", **options), LONGEST)  # type: ignore[arg-type]
    kernels.begin()
    assert not kernels.go_on()


SIZES = [(8192, 256, 131072), (2048, 4, 300), (1500, 1, 4096), (64, 8, 64)]


@pytest.mark.parametrize(("tokens", "seqs", "longest"), SIZES)
@pytest.mark.parametrize("captured", [True, False])
def test_rehearsals_are_batches_that_may_come(tokens: int, seqs: int, longest: int, captured: bool) -> None:
    config = EngineConfig("m", max_num_batched_tokens=tokens, max_num_seqs=seqs)
    found = list(rehearsals(config, longest, captured=captured))
    assert bool(found) == (not captured or tokens > MOST_MIXED_TOKENS)
    for lengths, tile_rows in found:
        assert 0 < sum(lengths) <= tokens and len(lengths) <= seqs
        assert min(lengths) > 0 and max(lengths) <= longest and tile_rows in TILE_ROWS
    if found:
        assert {tile_rows for _, tile_rows in found} == set(TILE_ROWS)
        assert sum(found[0].lengths) == min(tokens, seqs * longest)


def test_steps_that_are_not_captured_have_few_plans() -> None:
    for sizes in ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))):
        for tile_rows in TILE_ROWS:
            # More tokens than are captured make 65 tiles of 16 rows at least.
            counts = range(65 if tile_rows == 16 else 1, 2000)
            plans = {default_plan(GroupShape(tile_rows, tile_count(count, tile_rows), *sizes)) for count in counts}
            assert len(plans) == 1, (sizes, tile_rows)
    assert [tile_count(count, 16) for count in (1, 2, 5, 16, 17, 65, 256, 999)] == [1, 4, 16, 16, 64, 256, 256, 256]
