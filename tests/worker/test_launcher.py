"""What accelerate is asked for: one process, all threads, whatever the user's own configuration says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher

PRINT_WORLD = """
import json, os, sys
names = ["RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU"]
open(sys.argv[1], "w").write(json.dumps({name: os.environ.get(name) for name in names}))
sys.exit(7)
"""


class PrintingLauncher(AccelerateLauncher):
    """Launches a script that tells its environment in place of the worker."""

    def __init__(self, engine: EngineConfig, script: Path, answer: Path) -> None:
        super().__init__(engine)
        self.script, self.answer = script, answer

    def _command(self, folder: Path) -> list[str]:
        command = list(super()._command(folder))
        end = command.index("-m", command.index("--config_file"))
        return [*command[:end], str(self.script), str(self.answer), str(folder)]


def open_files() -> set[tuple[str, str]]:
    """Descriptors of this process with what each is of: others' may be let go at any moment, and be used again."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            found.add((descriptor.name, str(descriptor.readlink())))
    return found


def launch(launcher: PlainLauncher) -> int:
    async def work() -> int:
        replica = await launcher.start("ipc:///nowhere", 0, 1)
        return await replica.wait()

    return asyncio.run(work())


def test_one_process_with_all_threads_against_a_misleading_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "accelerate"
    home.mkdir()
    misleading = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 4}
    (home / "default_config.yaml").write_text(json.dumps(misleading))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "script.py").write_text(PRINT_WORLD)
    answer = tmp_path / "answer.json"
    assert launch(PrintingLauncher(EngineConfig(model="m", device="cpu"), tmp_path / "script.py", answer)) == 1
    found = json.loads(answer.read_text())
    assert found == {
        "RANK": None,
        "WORLD_SIZE": None,
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "ACCELERATE_USE_CPU": "True",
    }


def test_the_workers_status_is_told_past_accelerate(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[2], 'status').write_text('4')\nsys.exit(4)"
    )
    launcher = PrintingLauncher(EngineConfig(model="m", device="cpu"), tmp_path / "script.py", tmp_path / "answer")
    assert launch(launcher) == 4


def test_threads_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(engine: EngineConfig) -> str:
        command = list(AccelerateLauncher(engine)._command(tmp_path))
        return command[command.index("--num_cpu_threads_per_process") + 1]

    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(EngineConfig(model="m")) == "5"
    assert threads(EngineConfig(model="m", num_threads=3)) == "3"


def test_nothing_is_left_of_a_launch_but_its_return_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = open_files()
    launcher = PlainLauncher(EngineConfig(model="m"), replica_factory="nowhere:nothing")

    async def work() -> int:
        replica = await launcher.start(f"ipc://{tmp_path}/nobody", 0, 1)
        # Nobody listens, so its last words stay with it until it is told to end.
        await replica.stop(0.0)
        await replica.stop(0.0)
        return await replica.wait()

    assert asyncio.run(work()) != 0
    assert list(tmp_path.iterdir()) == []
    assert open_files() <= before


def test_the_worker_reads_what_the_launcher_writes(tmp_path: Path) -> None:
    engine = EngineConfig(model="org/model", device="cpu", max_model_len=77, seed=3)
    config = WorkerConfig(endpoint="ipc:///x", replica_id=2, epoch=9, engine=engine)
    config.write(tmp_path / "worker.json")
    assert WorkerConfig.read(tmp_path / "worker.json") == config


def test_replicas_share_the_threads_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    engine = EngineConfig(model="m", device="cpu", decision_log="log.jsonl")
    two, one = (AccelerateLauncher(engine, num_replicas=number) for number in (2, 1))
    assert (two._num_threads(), one._num_threads()) == (2, 5)
    logs = [two._config("ipc://x", replica_id, 1).engine.decision_log for replica_id in (0, 1)]
    assert logs == ["log.jsonl.0", "log.jsonl.1"]
    assert one._config("ipc://x", 0, 1).engine.decision_log == "log.jsonl"
    assert AccelerateLauncher(engine, num_replicas=8)._num_threads() == 1


def test_several_replicas_get_the_visible_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def given(device: str, num_replicas: int) -> list[str | None]:
        launcher = PlainLauncher(EngineConfig(model="m", device=device), num_replicas=num_replicas)
        return [launcher._environment(i).get("CUDA_VISIBLE_DEVICES") for i in range(num_replicas)]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-abc")
    assert given("auto", 3) == ["3", "GPU-abc", "3"]
    assert given("auto", 1) == given("cpu", 1) == given("cuda:1", 1) == [None] and given("cpu", 2) == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert given("cuda", 2) == [None, None]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("peft_dist.worker.launcher._GPUS", str(tmp_path))
    assert given("cuda", 2) == ["0", "1"]


def test_ranks_of_a_replica_are_processes_of_one_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU too, where accelerate is known to start a single process and to say nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = PRINT_WORLD.replace("sys.argv[1]", "sys.argv[1] + os.environ['RANK']").replace("sys.exit(7)", "")
    (tmp_path / "script.py").write_text(script)
    engine = EngineConfig(model="m", device="cpu", tensor_parallel_size=2)
    assert launch(PrintingLauncher(engine, tmp_path / "script.py", tmp_path / "answer")) == 0
    found = [json.loads((tmp_path / f"answer{rank}").read_text()) for rank in range(2)]
    assert [(world["RANK"], world["WORLD_SIZE"]) for world in found] == [("0", "2"), ("1", "2")]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {world["OMP_NUM_THREADS"] for world in found} == {str(threads)}


def test_replicas_share_out_the_gpus_by_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,8")
    launcher = AccelerateLauncher(EngineConfig(model="m", tensor_parallel_size=2), num_replicas=3)
    seen = [launcher._environment(replica)["CUDA_VISIBLE_DEVICES"] for replica in range(3)]
    assert seen == ["2,3", "5,7", "2,3"]


def test_the_plain_launcher_starts_no_ranks() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 .* use --launcher accelerate"):
        PlainLauncher(EngineConfig(model="m", tensor_parallel_size=2))
