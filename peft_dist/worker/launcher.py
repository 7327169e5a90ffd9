"""Starts replicas as supervised child processes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

import peft_dist
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.messages import PROTOCOL_VERSION
from peft_dist.worker.config import DEFAULT_REPLICA_FACTORY, WorkerConfig
from peft_dist.worker.state_folder import StateFolder
from peft_dist.worker.status import told_status
from peft_dist.worker.survivors import Launch, record

_TERMINATE_SECONDS = 5.0
# Where nobody comes after this process, none of a launch outlives it.
_TETHER = (sys.executable, "-I", str(Path(__file__).with_name("tether.py")))
_GPUS = "/proc/driver/nvidia/gpus"


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; found without torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # As CUDA reads it: what is behind an index that there cannot be is not seen.
        named = itertools.takewhile(lambda gpu: gpu and not gpu.startswith("-"), map(str.strip, chosen.split(",")))
        return list(named)
    return [str(index) for index, _ in enumerate(Path(_GPUS).glob("*"))]


class LaunchedReplica:
    """A replica's process group. It learns of the end of this process, whose end of the lifeline then closes."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int, folder: Path) -> None:
        self._process = process
        self._lifeline = lifeline
        self._folder = folder
        self._end = asyncio.ensure_future(self._wait())

    async def wait(self) -> int:
        """Status when it has ended, as its worker told it, or the launcher's; negative is the signal that killed it."""
        return await asyncio.shield(self._end)

    async def stop(self, grace: float) -> None:
        """Wait ``grace`` seconds for its end, then terminate it, then kill it."""
        if not await self._ends_within(grace):
            self._signal(signal.SIGTERM)
            if not await self._ends_within(_TERMINATE_SECONDS):
                self._signal(signal.SIGKILL)
                await self.wait()

    def kill(self) -> None:
        """End it at once, also when it is stopped. Nothing happens when it has ended."""
        if not self._end.done():
            self._signal(signal.SIGKILL)

    async def _wait(self) -> int:
        code = await self._process.wait()
        # What the launcher left behind when it was killed itself.
        self._signal(signal.SIGKILL)
        os.close(self._lifeline)
        told = told_status(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)
        return code if told is None else told

    async def _ends_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait([self._end], timeout=seconds)
        return bool(done)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class PlainLauncher:
    """Runs ``python -m peft_dist.worker`` directly: one process, no accelerate."""

    starts_ranks = False

    def __init__(
        self,
        engine: EngineConfig,
        *,
        log_level: str = "info",
        replica_factory: str = DEFAULT_REPLICA_FACTORY,
        heartbeat_seconds: float = 1.0,
        num_replicas: int = 1,
        key_file: str | None = None,
        state: StateFolder | None = None,
        further: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            num_replicas: Replicas that share this machine.
            key_file: As in ``WorkerConfig``.
            state: Where launches are recorded, for another process to find them.
            further: More fields of ``WorkerConfig``.

        Raises:
            ConfigError: it is one process, and the replica takes several.
        """
        if engine.tensor_parallel_size > 1 and not self.starts_ranks:
            raise ConfigError(
                f"tensor_parallel_size={engine.tensor_parallel_size} takes as many processes, and the plain launcher "
                "starts one: use --launcher accelerate"
            )
        self._key_file = key_file
        self._state = state
        self._further = further or {}
        self._engine = engine
        self._heartbeat_seconds = heartbeat_seconds
        self._num_replicas = num_replicas
        self._log_level = log_level
        self._replica_factory = replica_factory

    async def start(self, endpoint: str, replica_id: int, epoch: int) -> LaunchedReplica:
        """Start the process. Raises OSError when it cannot be started."""
        folder = self._folder(replica_id)
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            self._config(endpoint, replica_id, epoch).write(folder / "worker.json")
            # The worker reads its standard input to notice our end, however it comes.
            read_end, lifeline = os.pipe()
            undo.callback(os.close, lifeline)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(self._command(folder) if self._state else (*_TETHER, *self._command(folder))),
                    stdin=read_end,
                    start_new_session=True,
                    pass_fds=self._inherited(),
                    env={**os.environ, **self._environment(replica_id)},
                )
            finally:
                os.close(read_end)
            undo.pop_all()
        if self._state is not None:
            record(folder, process.pid, self.launch(replica_id))
        return LaunchedReplica(process, lifeline, folder)

    def launch(self, replica_id: int) -> Launch:
        """What a launch of a replica depends on, whichever incarnation it is."""
        assert self._state is not None
        config = msgspec.json.decode(msgspec.json.encode(self._config("", replica_id, 0)))
        # What is given at the start is the orchestrator's; what is logged is of no matter.
        del config["engine"]["pinned_adapters"], config["log_level"]
        with tempfile.TemporaryDirectory() as scratch:
            command = [part.replace(scratch, "") for part in self._command(Path(scratch))]
        return {
            "protocol": PROTOCOL_VERSION,
            "release": peft_dist.__version__,
            "command": command,
            "environment": self._environment(replica_id),
            "worker": config,
        }

    def _folder(self, replica_id: int) -> Path:
        if self._state is None:
            return Path(tempfile.mkdtemp(prefix="peft-dist-"))
        self._state.forget(replica_id)
        folder = self._state.of_replica(replica_id)
        folder.mkdir(mode=0o700)
        return folder

    def _config(self, endpoint: str, replica_id: int, epoch: int) -> WorkerConfig:
        return WorkerConfig(
            endpoint=endpoint,
            replica_id=replica_id,
            epoch=epoch,
            engine=self._share(replica_id),
            world_size=self._engine.tensor_parallel_size,
            heartbeat_seconds=self._heartbeat_seconds,
            replica_factory=self._replica_factory,
            key_file=self._key_file,
            log_level=self._log_level,
            **self._further,
        )

    def _environment(self, replica_id: int) -> dict[str, str]:
        """Several replicas share out the GPUs, in turn, one for each of their ranks."""
        gpus, size = visible_gpus(), self._engine.tensor_parallel_size
        if self._num_replicas == 1 or self._engine.device not in ("auto", "cuda") or len(gpus) < size:
            return {}
        first = replica_id % (len(gpus) // size) * size
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + size])}

    def _inherited(self) -> Sequence[int]:
        """Descriptors that the process gets besides its standard ones."""
        return ()

    def _share(self, replica_id: int) -> EngineConfig:
        """The options of one replica, with files of its own."""
        log = self._engine.decision_log
        if log is None or self._num_replicas == 1:
            return self._engine
        return replace(self._engine, decision_log=f"{log}.{replica_id}")

    def _command(self, folder: Path) -> Sequence[str]:
        return [sys.executable, "-m", "peft_dist.worker", str(folder / "worker.json")]


class AccelerateLauncher(PlainLauncher):
    """Runs the worker under ``accelerate launch``, which costs about 1.7 s (it imports torch before it starts).

    The launch gets a configuration file of its own: a user's default one may ask for several processes,
    FSDP or DeepSpeed.
    """

    starts_ranks = True

    def _command(self, folder: Path) -> Sequence[str]:
        config = folder / "accelerate.json"
        config.write_text(json.dumps(self._accelerate_config()))
        return [
            *(sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)),
            *("--num_cpu_threads_per_process", str(self._num_threads())),
            # A free one: every replica is a launch of its own.
            *(("--main_process_port", "0") if self._engine.tensor_parallel_size > 1 else ()),
            *("-m", "peft_dist.worker", str(folder / "worker.json")),
        ]

    def _accelerate_config(self) -> dict[str, object]:
        return {
            "compute_environment": "LOCAL_MACHINE",
            # Without a GPU too: with anything else accelerate starts one process on a CPU, and says nothing.
            "distributed_type": "MULTI_GPU" if self._engine.tensor_parallel_size > 1 else "NO",
            "num_machines": 1,
            "num_processes": self._engine.tensor_parallel_size,
            "machine_rank": 0,
            "mixed_precision": "no",
            "gpu_ids": "all",
            "use_cpu": self._engine.device == "cpu",
            "debug": False,
        }

    def _num_threads(self) -> int:
        """Without this option accelerate sets OMP_NUM_THREADS to 1."""
        processes = self._num_replicas * self._engine.tensor_parallel_size
        asked = self._engine.num_threads or os.environ.get("OMP_NUM_THREADS")
        return int(asked) if asked else max(1, len(os.sched_getaffinity(0)) // processes)


LAUNCHERS: dict[str, type[PlainLauncher]] = {"accelerate": AccelerateLauncher, "plain": PlainLauncher}
"""By the name that the command line knows them by."""
