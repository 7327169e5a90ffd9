"""Merging's memory: taken at the start, counted once, and for layers that few adapters target when one comes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import AdapterError, ConfigError
from peft_dist.runner import memory
from peft_dist.runner import replica as replica_module
from peft_dist.runner.adapter_memory import row_bytes
from peft_dist.runner.adapter_modules import describe_modules
from peft_dist.runner.memory import count_blocks
from peft_dist.runner.merge_state import MergeState
from peft_dist.runner.replica import Replica
from peft_dist.runner.swapped_models import SwappedModels
from tests.runner.test_adapter_tiers import WEIGHTS, ask, replica
from tests.tiny_models import make_model, random_adapter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"usual": PROJECTIONS, "head": ("q_proj", "lm_head"), "ids": ("q_proj", "embed_tokens")}
VOCABULARY_BYTES = 96 * 32 * 4
NUM_PROJECTIONS = 3 * 7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merging")
    model = make_model("llama", folder / "base")
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        random_adapter(model, folder / name, 4, 8.0, targets, seed=seed)
    return folder


def second_copies(served: Replica) -> list[int]:
    """Numbers of second copies, by what holds some."""
    merge = served.runner.merge
    if isinstance(merge, SwappedModels):
        return [len(merger._twins) for merger in merge._mergers]
    assert isinstance(merge, MergeState)
    return [len(getattr(merge._merger, "_twins" if merge.way == "shadow" else "_copies"))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"merge": "shadow"}, [NUM_PROJECTIONS]),
        ({"merge": "host"}, [NUM_PROJECTIONS]),
        ({"exec_type": "vllm", "resident_models": 3}, [NUM_PROJECTIONS] * 3),
    ],
)
def test_second_copies_are_made_at_the_start(root: Path, options: dict, expected: list[int]) -> None:
    with replica(root, pack_weights=False, **options) as served:
        assert second_copies(served) == expected
        usual = served.load_adapter("usual", root / "usual")
        ask(served, usual)
        assert second_copies(served) == expected


def test_layers_that_few_adapters_target_get_theirs_when_one_is_registered(root: Path) -> None:
    for options in ({"merge": "shadow"}, {"merge": "host"}):
        with replica(root, pack_weights=False, policy="merge", **options) as served:
            head = served.load_adapter("head", root / "head")
            assert second_copies(served) == [NUM_PROJECTIONS + 1]
            ask(served, head)
            assert served.engine.num_merged_steps > 0


def limited(monkeypatch: pytest.MonkeyPatch, served: Replica, num_bytes: int) -> None:
    """From now on second copies may take this much more."""
    merge = served.runner.merge
    assert merge is not None
    taken = merge.num_bytes
    monkeypatch.setattr(memory, "free_memory", lambda: max(taken + num_bytes - merge.num_bytes, 1))


def test_an_adapter_for_which_there_is_no_room_runs_unmerged(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And that of the other which was told to be mergeable stays so: the room is given once."""
    with replica(root, pack_weights=False, merge="shadow", policy="fcfs") as plain:
        expected = [ask(plain, plain.load_adapter(name, root / name))[0] for name in ADAPTERS]
    with replica(root, pack_weights=False, merge="shadow", policy="merge") as served:
        limited(monkeypatch, served, VOCABULARY_BYTES)
        specs = [served.load_adapter(name, root / name) for name in ADAPTERS]
        assert (
            f"adapter 'ids' cannot be merged: second copies of its layers would need {VOCABULARY_BYTES}" in caplog.text
        )
        assert [served.executor.can_merge(spec) for spec in specs] == [True, True, False]
        for spec, (tokens, _), merged in zip(specs, expected, (True, True, False), strict=True):
            before = served.engine.num_merged_steps
            assert ask(served, spec) == [(tokens, None)]
            assert (served.engine.num_merged_steps > before) == merged
        limited(monkeypatch, served, VOCABULARY_BYTES)
        served.load_adapter("ids", root / "ids")
        assert served.executor.can_merge(specs[2]), "asked anew"


@pytest.mark.parametrize("exec_type", ["peft", "vllm"])
def test_where_nothing_else_runs_it_is_refused(root: Path, exec_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with replica(root, pack_weights=False, exec_type=exec_type) as served:
        limited(monkeypatch, served, VOCABULARY_BYTES - 1)
        usual = served.load_adapter("usual", root / "usual")
        with pytest.raises(AdapterError, match=f"adapter 'head': .*bytes more.*exec_type='{exec_type}' runs nothing"):
            served.load_adapter("head", root / "head")
        assert list(served.engine.adapters) == served.store.registered == [usual.content_hash]


def reserved(root: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[int, str | None]:
    """What is left for later when KV is sized, beside pages of adapters; and the remedy that is named."""
    seen: list[tuple[int, str | None]] = []

    def spy(
        config: EngineConfig,
        device: torch.device,
        per_block: int,
        longest: int,
        later: int,
        warm_up: Callable[[], None],
        remedy: str | None,
        *rest: object,
    ) -> int:
        seen.append((later, remedy))
        return count_blocks(config, device, per_block, longest, later, warm_up, remedy, *rest)

    monkeypatch.setattr(replica_module, "count_blocks", spy)
    with replica(root, pack_weights=False, **options) as served:
        pages = (served.store.pool.num_rows or 0) * row_bytes(describe_modules(served.runner.model), torch.float32)
    [(later, remedy)] = seen
    return later - pages, remedy


def test_kv_is_sized_without_counting_second_copies_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there by then is in the measured peak. Only exec types that must merge wait for more of them."""
    assert reserved(root, monkeypatch, merge="shadow") == (0, "merge in place (--merge host)")
    assert reserved(root, monkeypatch, merge="off") == (0, None)
    assert reserved(root, monkeypatch, merge="shadow", exec_type="peft")[0] == 2 * VOCABULARY_BYTES
    later, remedy = reserved(root, monkeypatch, exec_type="vllm", resident_models=3)
    assert later == 3 * 2 * VOCABULARY_BYTES and "--resident-models" in str(remedy)


def test_the_log_says_way_bytes_and_what_cannot_be_merged(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_model("qwen2", tmp_path / "base")
    with replica(tmp_path, merge="host"):
        assert "by way of host: making second copies of 0 MiB" in caplog.text
        assert "2 of 23 modules cannot be merged into (1: its weight is shared with" in caplog.text
    caplog.clear()
    with replica(root, merge="shadow"):
        assert "by way of shadow" in caplog.text and "cannot be merged into" not in caplog.text


def test_too_little_memory_at_the_start(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    cases = (
        ({"merge": "shadow"}, r"way of shadow, take \d+ bytes, but 1000 are left of host memory.*--merge host"),
        ({"merge": "host"}, r"way of host.*--merge off"),
        ({"exec_type": "peft"}, r"way of host"),
        ({"exec_type": "vllm"}, r"way of models.*--resident-models"),
    )
    for options, message in cases:
        with pytest.raises(ConfigError, match=message), replica(root, **options):
            pass
    with replica(root) as served:
        assert "adapters run unmerged: second copies" in caplog.text
        assert served.model_info.merge_way == "off"


def test_a_base_embedding_that_an_adapter_brings_is_compared_with_the_base(root: Path, tmp_path: Path) -> None:
    """Not with what another adapter has made of it in place."""
    model = make_model("llama", tmp_path / "base")
    folder = random_adapter(model, tmp_path / "whole", 4, 8.0, ("q_proj", "embed_tokens"), seed=9)
    copy = {"base_model.model.model.embed_tokens.base_layer.weight": model.model.embed_tokens.weight.detach().clone()}
    save_file(load_file(folder / WEIGHTS) | copy, folder / WEIGHTS)
    with replica(root, merge="host", policy="merge") as served:
        ids = served.load_adapter("ids", root / "ids")
        ask(served, ids)
        assert served.executor.merged_adapter() == ids.content_hash
        assert served.inspect_adapter("whole", folder).name == "whole"
        name = next(iter(copy))
        merged = served.runner.model.get_submodule("model.embed_tokens").base_layer.weight.detach().clone()
        assert not torch.equal(merged, copy[name])
        save_file(load_file(folder / WEIGHTS) | {name: merged}, folder / WEIGHTS)
        with pytest.raises(AdapterError, match="differs from this base's"):
            served.inspect_adapter("whole", folder)


def test_models_of_adapters_that_are_gone_are_freed(root: Path) -> None:
    with replica(root, exec_type="vllm") as served:
        merge = served.runner.merge
        assert isinstance(merge, SwappedModels)
        usual, head = (served.load_adapter(name, root / name) for name in ("usual", "head"))
        ask(served, usual)
        ask(served, head)
        assert merge.host_bytes > 0 and merge.holds(usual.content_hash)
        for spec in (usual, head):
            served.engine.forget_adapter(spec.content_hash)
        assert merge.host_bytes == 0 and not merge.holds(usual.content_hash)
