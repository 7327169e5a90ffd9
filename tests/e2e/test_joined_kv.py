"""Requests move with their KV between a server's replica and one that joined, which cannot open each other's memory."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig, KVTransfer
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.guests import Invitation
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.joining import JoinSettings, join
from peft_dist.worker.kv_address import of_server
from peft_dist.worker.launcher import PlainLauncher
from tests.e2e.test_handover_processes import NUM_TOKENS, blocks_are_free, kinds, read
from tests.e2e.test_processes import run
from tests.e2e.test_replicas import until
from tests.e2e.test_serve import adapter, serving
from tests.tiny_models import make_model, random_adapter, target_modules

FACTORY = "tests.worker.far_replica:build"


@asynccontextmanager
async def started(
    folder: Path, host: str, key_file: Path | None, kv_endpoint: str | None, kv_transfer: KVTransfer = "auto"
) -> AsyncIterator[EngineService]:
    """A service that listens at ``host`` with a replica of its own, and one that joined over loopback."""
    sizes = {"max_model_len": 200, "block_size": 4, "num_blocks": 400, "num_threads": 1}
    config = EngineConfig(str(folder / "base"), device="cpu", dtype="float32", kv_transfer=kv_transfer, **sizes)
    # By which way KV comes is told there.
    log_level = "error" if kv_transfer == "auto" else "info"
    keys = None if key_file is None else ClusterKeys.read(key_file)
    own = {"kv_endpoint": of_server(f"tcp://{host}:0", has_keys=keys is not None)}
    launcher = PlainLauncher(
        config,
        log_level=log_level,
        replica_factory=FACTORY,
        num_replicas=2,
        key_file=None if key_file is None else str(key_file),
        further=own,
    )
    invitation = Invitation(f"tcp://{host}:0", config, FACTORY, keys)
    service = EngineService(launcher, OrchestratorOptions(64, 64, 1), stop_grace=5.0, invitation=invitation)
    assert service.guests is not None
    port, stop = service.guests.endpoint.rpartition(":")[2], asyncio.Event()
    settings = JoinSettings(f"tcp://127.0.0.1:{port}", key_file, {}, "plain", kv_endpoint, log_level=log_level)
    starting = asyncio.create_task(service.start())
    guest = asyncio.create_task(join(settings, stop))
    try:
        await starting
        await until(lambda: len(service.replica_pids()) == 2)
        await service.load_adapter("a", str(folder / "a"))
        yield service
    finally:
        stop.set()
        await guest
        await service.stop()


def model(folder: Path) -> Path:
    random_adapter(make_model("llama", folder / "base"), folder / "a", 4, 8.0, target_modules("llama"))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_requests_move_with_their_kv_to_one_that_joined_and_back(tmp_path: Path, host: str) -> None:
    """Every address with keys, or this machine's alone without."""
    key_file = None if host == "127.0.0.1" else tmp_path / "keys.json"
    if key_file is not None:
        ClusterKeys.make().write(key_file)

    run(move_there_and_back(tmp_path, host, key_file, "auto"))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_they_do_so_by_nixl(tmp_path: Path, host: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nixl")
    key_file = None if host == "127.0.0.1" else tmp_path / "keys.json"
    if key_file is not None:
        ClusterKeys.make().write(key_file)
    run(move_there_and_back(tmp_path, host, key_file, "nixl"))
    logs = capfd.readouterr().err
    # Once on each side: the connection is kept.
    assert logs.count("comes by NIXL") == 2 and "comes over TCP" not in logs


async def move_there_and_back(folder: Path, host: str, key_file: Path | None, kv_transfer: KVTransfer) -> None:
    async with started(model(folder), host, key_file, None, kv_transfer) as service:
        alone = [await read(service, f"alone{i}", *kind) for i, kind in enumerate(kinds())]
        rng = random.Random(0)
        moving = [
            read(service, f"m{i}", *kind, frozenset(rng.sample(range(1, NUM_TOKENS), 6)))
            for i, kind in enumerate(kinds())
        ]
        assert await asyncio.gather(*moving) == alone
        handover = service._core.handover
        assert handover.num_with_kv > 8 and not handover.num_failed and not handover.num_recomputed
        await blocks_are_free(service)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_one_that_is_told_to_offers_and_reads_none(tmp_path: Path) -> None:
    async def work() -> None:
        async with started(model(tmp_path), "127.0.0.1", None, "none") as service:
            alone = [await read(service, f"alone{i}", *kind) for i, kind in enumerate(kinds())]
            moving = [read(service, f"m{i}", *kind, frozenset([10, 30])) for i, kind in enumerate(kinds())]
            assert await asyncio.gather(*moving) == alone
            handover = service._core.handover
            assert (handover.num_recomputed, handover.num_with_kv) == (2 * len(alone), 0)

    run(work())


def test_a_server_that_listens_tells_its_replicas_to_serve_their_kv_there(tmp_path: Path) -> None:
    keys, state = tmp_path / "keys.json", tmp_path / "state"
    ClusterKeys.make().write(keys)
    sql = adapter(tmp_path / "sql", "two")
    listen = ["--listen", "tcp://0.0.0.0:0", "--cluster-key", str(keys), "--state-dir", str(state)]
    with serving(tmp_path, *listen, "--adapter", f"sql={sql}") as server:
        [config] = state.glob("*/worker.json")
        told = json.loads(config.read_text())
        assert (told["kv_endpoint"], told["key_file"]) == ("tcp://0.0.0.0:*", str(keys))
        assert server.post("/v1/completions", {"model": "sql", "prompt": [5], "max_tokens": 2}).status_code == 200
        assert server.stop() == 0
