"""The link to a replica that joined is cut for ten seconds and healed, with a real model and the usual time-outs."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scripts.demo_model import ensure_demo_model
from tests.e2e.fault_scenario import Case, make_cases, run_alone
from tests.e2e.http_scenario import HERE, Clients, ModelServer, Streams, clients_of, serving
from tests.e2e.test_serve import COMMAND, ROOT
from tests.ports import free_address
from tests.relay import Relay

SECONDS = 10.0
# Tokens that have come by then.
CUT_AT = 800
Scene = tuple[dict[str, str | Path], list[Case]]


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Adapters, and requests with what each is alone."""
    folder = ROOT / "scripts" / "demo_adapters"
    adapters: dict[str, str | Path] = {name: folder / name for name in ("json", "sql")}
    cases = make_cases(48, 100, 49_000, [None, *adapters])
    run_alone(ensure_demo_model(), adapters, cases, num_blocks=2048)
    return adapters, cases


@asynccontextmanager
async def joined(server: ModelServer, clients: Clients, address: str) -> AsyncIterator[Relay]:
    """``peft-dist worker`` joins by the relay; it is told to leave in the end."""
    async with Relay(address) as relay:
        command = [*COMMAND, "worker", "--join", relay.address, *HERE]
        with (server.log_file.with_name("worker").open("w") as log, subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        ) as worker):  # fmt: skip
            try:
                while not await clients.are_ready(2):
                    assert worker.poll() is None and server.process.poll() is None, server.log
                    await asyncio.sleep(0.1)
                yield relay
                worker.terminate()
                assert await asyncio.to_thread(worker.wait, 60) == 0
            finally:
                worker.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("directions", ["both", "up", "down"])
def test_nothing_is_lost_or_doubled(directions: str, scene: Scene, tmp_path: Path) -> None:
    """``up`` is what the replica says, ``down`` what it is told."""
    adapters, cases = scene
    address = free_address()

    async def work(server: ModelServer) -> None:
        async with clients_of(server) as clients, joined(server, clients, address) as relay:
            streams = Streams(clients, cases, again=True)
            try:
                await streams.until_drawn(CUT_AT)
                [running] = await clients.gauges("requests_running")
                assert len(running) == 2 and all(running.values()), running
                relay.cut(*{"both": (relay.up, relay.down), "up": (relay.up,), "down": (relay.down,)}[directions])
                await streams.wait(SECONDS)
                relay.heal()
                await streams.until(lambda: clients.are_ready(2))
                streams.ask_no_more()

                # One that is served by two would be counted twice, as long as it runs.
                async def each_has_one_owner() -> bool:
                    assert streams.num_open, "they ended before it could be seen"
                    return await clients.num_held() == streams.num_open

                await streams.until(each_has_one_owner)
                await streams.end()
                # Perhaps the silence was noticed only after it.
                await streams.until(lambda: clients.are_ready(2))
                await streams.until(clients.are_empty)
            finally:
                await streams.cancel()

    with serving(tmp_path, ensure_demo_model(), adapters, "--num-blocks", "2048", "--listen", address) as server:
        asyncio.run(work(server))
        assert server.stop() == 0 and "Traceback" not in server.log
