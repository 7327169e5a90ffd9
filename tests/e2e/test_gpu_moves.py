"""KV from one GPU to another, between processes, without a way through host memory (pytest -m gpu; most need two)."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import Exported, Imported
from peft_dist.runner.descriptor_server import DescriptorServer, fetch_descriptor
from peft_dist.runner.device_memory import DeviceMemory, find_obstacle
from peft_dist.runner.device_way import GRAIN_BYTES
from peft_dist.runner.replica import Replica, build_replica
from tests.e2e.test_handover import Running, request
from tests.tiny_models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

NUM_BYTES = 37 << 20
PROMPT = [3 + i % 40 for i in range(150)]
PARAMS: dict[str, object] = {"temperature": 0.9, "top_k": 8, "max_tokens": 60}
STEPS = 24


class Told(msgspec.Struct):
    """What the process of the other GPU tells of a request."""

    drawn: list[int]
    state: SequenceState


@contextmanager
def on_the_other_gpu(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """This file as a process that sees the second GPU alone."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": seen[1] if len(seen) > 1 else seen[0]}
    command = [sys.executable, "-m", "tests.e2e.test_gpu_moves", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def build(model: str) -> Running:
    config = EngineConfig(
        model, device="cuda", dtype="float32", max_model_len=240, block_size=4, num_blocks=200, depth=1,
        max_num_batched_tokens=64, enforce_eager=True,
    )  # fmt: skip
    return Running(build_replica(config))


def alone(replica: Replica) -> list[int]:
    running = Running(replica)
    replica.engine.add_request(request("alone", PROMPT, PARAMS, None, []))
    running.drain()
    return running.drawn["alone"]


def test_device_memory_is_read_as_it_was_written_and_given_back() -> None:
    device = torch.device("cuda", 0)
    assert find_obstacle(device) is None
    written = torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, device=device)
    read = torch.zeros_like(written)
    # Torch keeps what a comparison takes, and the driver what its code takes: both are taken now.
    assert not torch.equal(read, written)
    free = torch.cuda.mem_get_info(device)[0]
    for _ in range(3):
        memory = DeviceMemory(NUM_BYTES, device)
        opened = DeviceMemory(NUM_BYTES, device, memory.descriptor)
        memory.put(0, written)
        opened.get(0, read[: NUM_BYTES // 2])
        opened.get(NUM_BYTES // 2, read[NUM_BYTES // 2 :])
        torch.cuda.synchronize()
        assert torch.equal(read, written)
        read.zero_()
        memory.close()
        opened.get(0, read)
        torch.cuda.synchronize()
        assert torch.equal(read, written), "it is there until the last one lets go"
        opened.close()
    assert torch.cuda.mem_get_info(device)[0] >= free - (8 << 20)


@needs_two
def test_memory_of_another_gpu_outlives_the_process_that_owns_it() -> None:
    device = torch.device("cuda", 0)
    with on_the_other_gpu("memory") as owner:
        address = line_of(owner).decode()
        descriptor = fetch_descriptor(address, "t" * 32, b"d")
        memory = DeviceMemory(NUM_BYTES, device, descriptor)
        os.close(descriptor)
        owner.kill()
        owner.wait()
    piece = torch.empty(NUM_BYTES, dtype=torch.uint8, device=device)
    memory.get(0, piece)
    torch.cuda.synchronize()
    assert torch.equal(piece.cpu(), torch.arange(NUM_BYTES, dtype=torch.int32).to(torch.uint8))
    memory.close()


@needs_two
@pytest.mark.parametrize("dies", ["never", "before", "after"])
def test_a_request_goes_from_gpu_to_gpu(dies: str, tmp_path: Path) -> None:
    """``dies``: The source, before or after the target has what it needs."""
    make_model("llama", tmp_path / "base")
    target = build(str(tmp_path / "base"))
    expected = alone(target.replica)
    with on_the_other_gpu("replica", str(tmp_path / "base")) as source:
        told = msgspec.json.decode(line_of(source), type=Told)
        [kv, *_] = told.state.kv
        assert kv.server is not None, "it stayed on the device"
        assert told.state.num_computed_tokens > len(PROMPT)
        if dies == "before":
            source.kill()
            source.wait()
        moving = request("r", PROMPT, PARAMS, None, told.drawn)
        target.replica.handovers.import_requests(1, [moving], [told.state])
        report = target.wait()
        assert isinstance(report, Imported)
        if dies == "before":
            assert report.error is not None and "MemoryGoneError" in report.error
            # From the tokens that are known.
            target.replica.engine.add_request(request("r", PROMPT, PARAMS, None, told.drawn))
        else:
            assert report.error is None and moving.num_computed_tokens == told.state.num_computed_tokens
            devices = target.replica.executor.transfers.devices
            assert devices is not None and devices._can_map, "not through the host"
        if dies == "after":
            source.kill()
            source.wait()
        target.drawn["r"] = list(told.drawn)
        target.drain()
        assert target.drawn["r"] == expected
        target.assert_empty()
        if dies == "never":
            assert source.stdin is not None
            source.stdin.close()
            assert line_of(source) == b"0 bytes left"
    target.replica.close()


def _be_a_replica(model: str) -> None:
    source = build(model)
    source.replica.engine.add_request(request("r", PROMPT, PARAMS, None, []))
    while len(source.drawn.get("r", [])) < STEPS:
        source.step()
    source.replica.handovers.export(1, ["r"])
    exported = source.wait()
    assert isinstance(exported, Exported) and exported.error is None
    [state] = exported.sequences
    print(msgspec.json.encode(Told(source.drawn["r"], state)).decode(), flush=True)
    sys.stdin.read()
    source.replica.handovers.end_export(1, moved=True)
    source.assert_empty()
    transfers = source.replica.executor.transfers
    # What was exported has been let go when the thread of the copies has done the next thing.
    transfers.start_export(-2, [0], on_host=False)
    while not transfers.take():
        select.select([transfers.fileno()], [], [])
    assert transfers.devices is not None
    left = transfers.devices._used - GRAIN_BYTES
    source.replica.close()
    print(f"{left} bytes left", flush=True)


def _be_the_owner_of_memory() -> None:
    device = torch.device("cuda", 0)
    memory, server = DeviceMemory(NUM_BYTES, device), DescriptorServer()
    memory.put(0, torch.arange(NUM_BYTES, dtype=torch.int32, device=device).to(torch.uint8))
    torch.cuda.synchronize()
    server.offer("t" * 32, lambda kind: memory.descriptor)
    print(server.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        _be_the_owner_of_memory()
    else:
        _be_a_replica(sys.argv[2])
