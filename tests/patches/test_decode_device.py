"""Captured decode passes go by device tensors alone; on a GPU they are CUDA graphs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import peft_dist
from peft_dist.kernels.capture import CudaCapture
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.types import AttentionMetadata, LoRAPlan
from peft_dist.patches.decode_graphs import DecodeGraphs, DecodePass
from peft_dist.patches.decode_inputs import DecodeInputs
from tests import triton_interpreter
from tests.kernels.device_cases import DEVICES
from tests.patches import oracle
from tests.patches.captures import NEW, assert_same, call, graphs_of, linear_adapters, patched, run_again

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
gpu = lambda test: functools.reduce(lambda f, mark: mark(f), GPU, test)  # noqa: E731
# float32 products are TF32 where a kernel or cuBLAS may choose.
CLOSE = {"cpu": 1e-4, "cuda": 5e-3}


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> None:
    if not torch.cuda.is_available():
        triton_interpreter.mend()


def capture_on(device: str) -> Any:
    return run_again if device == "cpu" else CudaCapture(torch.device(device))


def poison_host_arrays(patch: pytest.MonkeyPatch) -> None:
    """Captured passes get plans and metadata whose host side is nonsense, for kernels that must not read it."""
    metadata, plan = DecodeInputs.metadata, DecodeInputs.plan

    def poisoned_metadata(self: DecodeInputs) -> AttentionMetadata:
        meta = metadata(self)
        wrong = {
            name: np.full_like(getattr(meta, name), -7) for name in ("context_lens", "block_tables", "slot_mapping")
        }
        return dataclasses.replace(meta, backend="triton", **wrong)

    def poisoned_plan(self: DecodeInputs) -> LoRAPlan | None:
        made = plan(self)
        if made is None:
            return None
        starts = np.array([0, self.rows], np.int32)
        return LoRAPlan(np.array([99], np.int32), starts, backend="triton", tiles=made.tiles)

    patch.setattr(DecodeInputs, "metadata", poisoned_metadata)
    patch.setattr(DecodeInputs, "plan", poisoned_plan)
    # On a GPU this is so already.
    patch.setattr("peft_dist.patches.live_weights.LoRAPool", functools.partial(LoRAPool, grows_tables=True))


@pytest.mark.parametrize("device", DEVICES)
def test_captured_passes_read_the_device_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear_adapters(3, 9, device=device)
    poison_host_arrays(monkeypatch)
    model, recorder = patched(linear_adapters(3, 9, device=device), capture_on(device))
    batches = [["a0", "a1", "__base__"], ["a1", "__base__", "a0"]]
    for seed, names in enumerate(batches):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "inputs": oracle.inputs(3, seed=seed)}
        assert_same(call(model, names, **options), call(plain, names, **options), CLOSE[device])
    assert (recorder.captured, recorder.replayed) == (1, 6)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_adapters_that_make_the_pool_grow(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and tables move, which earlier captures know nothing of; then they stay."""
    ranks = (2, 8, 17, 1)
    plain = linear_adapters(*ranks, device=device)
    poison_host_arrays(monkeypatch)
    model, recorder = patched(linear_adapters(*ranks, device=device), capture_on(device))
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    for name in ("a0", "a1", "a2", "a3", "a1"):
        names = [name, "__base__"]
        assert_same(call(model, names, **options), call(plain, names, **options), CLOSE[device])
    assert recorder.replayed == 10


@gpu
def test_a_gpu_captures_by_itself() -> None:
    plain, model = (linear_adapters(4, 8, 16, device="cuda") for _ in range(2))
    peft_dist.patch(model)
    for rows, new in ((7, 30), (33, 12), (7, 30), (128, 5)):
        names = [("a0", "a1", "a2", "__base__")[row % 4] for row in range(rows)]
        options = {"max_new_tokens": new, "min_new_tokens": new}
        assert_same(call(model, names, **options), call(plain, names, **options), CLOSE["cuda"])
    assert graphs_of(model).num_graphs


@gpu
def test_weights_that_change_in_place_are_seen() -> None:
    plain, model = (linear_adapters(4, 8, device="cuda") for _ in range(2))
    peft_dist.patch(model)
    names = ["a0", "a1", "__base__"]
    call(model, names)
    for changed in (plain, model):
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                if "lora_B.a0" in name or name.endswith("o_proj.base_layer.weight"):
                    parameter.mul_(-0.7)
    assert_same(call(model, names), call(plain, names), CLOSE["cuda"])


@gpu
def test_logits_that_are_handed_out_stay_what_they_were() -> None:
    model = peft_dist.patch(linear_adapters(4, device="cuda"))
    seen: list[Any] = []
    model.get_base_model().register_forward_hook(lambda module, args, output: seen.append(output.logits))
    answer = call(model, ["a0", "__base__"])
    assert graphs_of(model).num_graphs == 1 and len(seen) == NEW
    for logits, kept in zip(seen, answer.logits, strict=True):
        assert torch.equal(logits[:, -1].float(), kept)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_replayed_step_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_dist.patch(linear_adapters(4, 8, device="cuda"))
    names = ["a0", "a1", "__base__"]
    expected = call(model, names).sequences
    run, replayed = DecodeGraphs.run, []

    def checked(self: DecodeGraphs, step: DecodePass) -> Any:
        # The first step of a call brings its rows' adapters to the device.
        if not replayed:
            replayed.append(run(self, step))
            return replayed[-1]
        with no_waiting():
            replayed.append(run(self, step))
        return replayed[-1]

    monkeypatch.setattr(DecodeGraphs, "run", checked)
    assert torch.equal(call(model, names).sequences, expected)
    assert len(replayed) == NEW - 1 and all(output is not None for output in replayed)


@gpu
def test_a_model_that_waits_for_the_device_runs_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaForCausalLM.forward
    expected = call(linear_adapters(4, device="cuda"), ["a0", "__base__"])

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        assert output.logits.isfinite().all().item()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    model = peft_dist.patch(linear_adapters(4, device="cuda"))
    for _ in range(2):
        assert_same(call(model, ["a0", "__base__"]), expected, CLOSE["cuda"])
    assert graphs_of(model).num_graphs == 0
    monkeypatch.undo()
    assert_same(call(model, ["a0", "__base__"]), expected, CLOSE["cuda"])
    assert graphs_of(model).num_graphs == 1


@gpu
def test_unpatch_gives_the_device_memory_back() -> None:
    model = peft_dist.patch(linear_adapters(4, device="cuda"))
    call(model, ["a0", "__base__"], max_new_tokens=200)
    memory = graphs_of(model).memory
    assert memory is not None and memory.num_bytes > 0
    kept, before = memory.num_bytes, torch.cuda.memory_allocated()
    del memory
    peft_dist.unpatch(model)
    assert torch.cuda.memory_allocated() <= before - kept


def test_what_a_cpu_does_with_nan_in_unused_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is kept holds whatever the last call left there."""
    model, recorder = patched(linear_adapters(3))
    expected = call(model, ["a0", "__base__"])
    memory = graphs_of(model).memory
    assert memory is not None
    for cache in memory.caches.values():
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)
    assert_same(call(model, ["a0", "__base__"]), expected)
    assert recorder.captured == 1
