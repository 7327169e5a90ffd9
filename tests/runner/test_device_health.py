"""A device that can do nothing more, and who notices (on a GPU: pytest -m gpu)."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_dist.engine.executor import LoadOutcome, TransferOutcome
from peft_dist.runner.device_health import check_device, peak_memory_bytes
from peft_dist.runner.executor import TorchExecutor

ON_A_GPU = """
import threading
import torch
from peft_dist.core.errors import DeviceLostError
from peft_dist.runner.device_health import check_device
from tests.worker.failing_device import break_device, run_out_of_memory

device = torch.device("cuda", 0)
check_device(device)
try:
    run_out_of_memory(device)
except torch.OutOfMemoryError:
    check_device(device)

def fail_elsewhere():
    with torch.cuda.stream(torch.cuda.Stream(device)):
        break_device(device)
        try:
            torch.cuda.current_stream(device).synchronize()
        except RuntimeError as error:
            print(type(error).__name__)

thread = threading.Thread(target=fail_elsewhere)
thread.start()
thread.join()
try:
    check_device(device)
except DeviceLostError as error:
    print(error)
"""


def test_a_cpu_is_never_lost() -> None:
    check_device(torch.device("cpu"))


@pytest.fixture
def executor() -> TorchExecutor:
    """Whose loads and copies end as the tests say."""
    made: Any = TorchExecutor.__new__(TorchExecutor)
    made._slots = {}
    made.transfers, made._loader = SimpleNamespace(), SimpleNamespace()
    return made


def test_a_load_or_a_copy_that_failed_has_the_device_looked_at(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(executor, "check_device", lambda: looks.append(len(looks)))
    loads, copies = [LoadOutcome("a", 0, None, 0.1)], [TransferOutcome(1, None, None, 0.1)]
    executor._loader.take, executor.transfers.take = lambda: loads, lambda: copies
    assert executor.take_loaded() == loads and executor.take_transfers() == copies and not looks
    loads += [LoadOutcome("b", 1, "no such file", 0.1)]
    assert executor.take_loaded() == loads and len(looks) == 1
    copies += [TransferOutcome(2, None, "the memory is gone", 0.1)]
    assert executor.take_transfers() == copies and len(looks) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_assertion_in_a_kernel_takes_the_device_and_too_little_memory_does_not() -> None:
    run = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True, check=True)
    kind, told = run.stdout.splitlines()[:2]
    assert kind == "AcceleratorError" and told.startswith("cuda:0 can do nothing more"), run.stdout


def test_peak_memory_is_kept_after_what_took_it_is_gone() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = bytearray(b"x" * (before + (64 << 20)))
    high = peak_memory_bytes(torch.device("cpu"))
    assert high >= before + (64 << 20)
    del held
    assert peak_memory_bytes(torch.device("cpu")) >= high
