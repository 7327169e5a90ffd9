"""Building the C kernels: cache, concurrency, one thread pool, and what happens without a compiler."""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_dist.kernels import attention_cpu, backend, cpu_build, lora, lora_cpu, reference
from tests.kernels.cases import assert_close, layer_of, plan_of, skip_without


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has built nothing yet, with an empty cache."""
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_build, "_libraries", {})
    monkeypatch.setattr(lora_cpu, "_functions", lora_cpu._FunctionTable())
    monkeypatch.setattr(attention_cpu, "_functions", {})
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def tasks() -> set[str]:
    """Threads of this process; those of other tests may end at any moment."""
    return {task.name for task in Path("/proc/self/task").iterdir()}


@pytest.mark.parametrize("compiler", ["no-such-compiler", "exit 1", "exec sleep 60", "read-only"])
def test_without_a_working_compiler_torch_runs_and_says_so_once(
    compiler: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if compiler == "read-only":
        monkeypatch.setenv("PEFT_DIST_CACHE", "/proc/no-such-folder")
    elif compiler == "no-such-compiler":
        monkeypatch.setenv("PEFT_DIST_CC", compiler)
    else:
        monkeypatch.setattr(cpu_build, "_COMPILE_SECONDS", 0.5)
        monkeypatch.setenv("PEFT_DIST_CC", str(script(fresh / "cc", compiler)))
    with caplog.at_level(logging.WARNING):
        assert backend.choose("cpu") == "torch"
        assert backend.choose("cpu") == "torch"
    assert len([r for r in caplog.records if "torch runs instead" in r.message]) == 1
    weights, plan = layer_of([2, 3], (8, 8), torch.float32, 0), plan_of(np.array([0, 1]))
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    assert_close(lora.add_lora_(y.clone(), x, weights, plan), reference.add_lora_(y.clone(), x, weights, plan))


def test_a_compiler_that_is_not_asked_for_is_not_run(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_DIST_CC", str(script(fresh / "cc", f"touch {fresh}/ran; exit 1")))
    assert backend.choose("cpu", compile_kernels=False) == "torch"
    assert not (fresh / "ran").exists()
    assert backend.choose("cpu") == "torch"
    assert (fresh / "ran").exists()


def test_types_without_kernels_need_no_compiler(fresh: Path) -> None:
    assert backend.choose("cpu", dtype=torch.float64) == "torch"
    assert not (fresh / "cache").exists()


def test_a_built_library_is_reused_until_its_sources_change(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without("c", torch.float32)
    first = cpu_build.build(torch.float32)
    written = first.stat().st_mtime_ns
    assert cpu_build.build(torch.float32) == first and first.stat().st_mtime_ns == written
    monkeypatch.setattr(cpu_build, "_FLAGS", (*cpu_build._FLAGS, "-DOTHER"))
    assert cpu_build._key(cpu_build._find_compiler(), cpu_build.openmp_runtime()) not in first.name
    assert sorted(p.suffix for p in first.parent.iterdir()) == [".so"], "work files were left behind"


def test_processes_that_build_at_the_same_time_both_get_a_whole_library(fresh: Path) -> None:
    skip_without("c", torch.float32)
    code = (
        "import sys, torch; from peft_dist.kernels import cpu_build; sys.stdin.readline();"
        "assert cpu_build.library(torch.float32) is not None; print(cpu_build.build(torch.float32))"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    outputs = [worker.communicate(timeout=280)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert outputs[0] == outputs[1] and Path(outputs[0]).exists()


def test_kernels_run_on_torchs_own_thread_pool() -> None:
    skip_without("c", torch.float32)
    weights = layer_of([16, 16], (512, 512), torch.float32, 0)
    plan = plan_of(np.arange(400) % 2, "c")
    x, y = torch.randn(400, 512), torch.zeros(400, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.mm(x, x.T)
        with_torch = tasks()
        lora.add_lora_(y, x, weights, plan)
        assert tasks() <= with_torch
    finally:
        torch.set_num_threads(before)


def test_the_library_links_the_runtime_of_torch() -> None:
    skip_without("c", torch.float32)
    library = cpu_build.library(torch.float32)
    assert isinstance(library, ctypes.PyDLL)
    used = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert used == ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, ctypes.c_void_p).value
