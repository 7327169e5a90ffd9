"""How a GPU's memory is shared out, on a GPU that is made of numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.runner import memory
from peft_dist.runner.graph_setup import graph_bytes
from peft_dist.runner.memory import MemoryLeft, adapter_host_bytes, count_blocks

CUDA = torch.device("cuda", 0)
TOTAL = 1000


class FakeDevice:
    """1000 bytes, of which other processes have 100 and torch the rest that is not free."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = 300
        self.peak = 300
        for name, answer in {
            "mem_get_info": lambda _: (TOTAL - 100 - self.peak, TOTAL),
            "memory_reserved": lambda _: self.peak,
            "max_memory_allocated": lambda _: self.peak,
            "reset_peak_memory_stats": lambda _: None,
            "synchronize": lambda _: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def allocate(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def run(self, activations: int) -> None:
        self.peak = max(self.peak, self.allocated + activations)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def options(**more: Any) -> EngineConfig:
    return EngineConfig("m", gpu_memory_utilization=0.8, max_num_seqs=100, block_size=1, **more)


def test_what_is_allocated_before_the_warm_up_is_counted_once(device: FakeDevice) -> None:
    """The share, less other processes, the peak with the shadow in it, and pages of adapters that come later."""
    device.allocate(200)
    count = count_blocks(options(), CUDA, 1, 20, 40, lambda: device.run(50))
    assert count == 800 - 100 - (300 + 200 + 50) - 40


def test_too_little_for_kv_names_merging_where_it_has_a_part(device: FakeDevice) -> None:
    device.allocate(390)
    with pytest.raises(ConfigError, match=r"lower adapter_device_memory, or merge in place \(--merge host\)$"):
        count_blocks(options(max_model_len=20), CUDA, 1, 20, 0, lambda: None, "merge in place (--merge host)")
    with pytest.raises(ConfigError, match=r"lower adapter_device_memory$"):
        count_blocks(options(max_model_len=20), CUDA, 1, 20, 0, lambda: None)


def test_what_merging_may_take_is_part_of_the_share(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = LoRAPool("cpu", torch.float32, num_rows=8)
    left = MemoryLeft(options(), CUDA, pool, 1000)
    pool.add_layer(10, 2)
    # Pages that are not allocated yet are still to come.
    assert pool.num_bytes > 0 and left(True) == 800 - 100 - 300 - (1000 - pool.num_bytes)
    left.promised = 7
    assert left(True) == 800 - 100 - 300 - (1000 - pool.num_bytes) - 7
    monkeypatch.setattr(memory, "free_memory", lambda: 55)
    assert left(False) == 55
    assert MemoryLeft(options(), torch.device("cpu"), pool, 0)(True) == 55
    monkeypatch.setattr(memory, "free_memory", lambda: 0)
    assert left(False) is None


def test_captured_steps_take_more_of_deeper_models_and_of_split_ones() -> None:
    def taken(num_layers: int, size: int) -> int:
        return graph_bytes(options(device="cuda", tensor_parallel_size=size), 1000, num_layers, 1 << 20)

    assert taken(0, 1) == taken(0, 4) > 0
    whole, split = ([taken(n, size) - taken(0, size) for n in (32, 80)] for size in (1, 4))
    assert whole[1] == pytest.approx(80 / 32 * whole[0]) and split[0] > 2 * whole[0]


@pytest.mark.parametrize("more", [{"policy": "fcfs"}, {"merge": "host"}])
def test_nothing_is_left_for_merged_steps_where_there_are_none(more: dict[str, str]) -> None:
    def taken(**more: str) -> int:
        return graph_bytes(options(device="cuda", **more), 1000, 32, 1 << 20)

    assert taken(**more) == taken(merge="off") < taken()


@pytest.mark.parametrize(("free", "wanted"), [(0, 2), (16, 2), (64, 4), (128, 8), (2000, 16)])
def test_copies_of_adapters_get_a_part_of_a_gpus_host(free: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free << 30)
    assert adapter_host_bytes(EngineConfig("m"), CUDA) == wanted << 30
    assert adapter_host_bytes(EngineConfig("m"), torch.device("cpu")) == 2 << 30
    assert adapter_host_bytes(EngineConfig("m", adapter_host_memory=0), CUDA) == 0
