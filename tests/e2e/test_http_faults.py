"""A server whose replicas are killed and stopped under load: every SSE stream is what its request is alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.bench.report import write_result
from scripts.demo_model import ensure_demo_model
from tests.e2e.fault_scenario import Case, make_cases, run_alone
from tests.e2e.http_scenario import Clients, ModelServer, Streams, clients_of, serving
from tests.e2e.test_llm import make_tokenizer
from tests.e2e.test_replica_faults import smollm2
from tests.tiny_models import make_model, random_adapter, target_modules

ROUNDS = int(os.environ.get("PEFT_DIST_FAULT_ROUNDS", "2"))
# A replica that dies soon after its start six times in a row is given up.
ROUNDS_OF_A_SERVER = 5
# The adapter that comes and goes under other names.
SPARE = "json"


async def one_round(server: ModelServer, clients: Clients, cases: Sequence[Case], goals: tuple[int, int]) -> float:
    """Stream all cases; the busier replica is killed at so many tokens, and the other one stopped at so many.

    Returns seconds from then until both were there again.
    """
    loop = asyncio.get_running_loop()
    streams = Streams(clients, cases)
    try:
        await streams.until_drawn(goals[0])
        [running] = await clients.gauges("requests_running")
        assert len(running) == 2 and all(running.values()), running
        victims = sorted(running, key=lambda replica_id: -running[replica_id])
        for victim, number, goal in zip(victims, (signal.SIGKILL, signal.SIGSTOP), goals, strict=True):
            await streams.until_drawn(goal)
            launch = server.launches()[victim]
            os.kill(server.worker(victim), number)
            began = loop.time()

            async def is_another(victim: int = victim, launch: int = launch) -> bool:
                return server.launches().get(victim, launch) != launch

            await streams.until(is_another)
        await streams.until(lambda: clients.are_ready(2))
        seconds = loop.time() - began
        await streams.end()
        await streams.until(clients.are_empty)
        return seconds
    finally:
        await streams.cancel()


async def rounds(
    server: ModelServer, cases: Sequence[Case], goals: tuple[int, int], number: int, spare: str | Path
) -> tuple[list[float], int]:
    """In all of them an adapter comes, is asked and leaves. Returns each round's seconds, and how often it did."""
    case = next(case for case in cases if case.adapter == SPARE and case.params.temperature == 0.0)
    async with clients_of(server) as clients:
        over = asyncio.Event()
        async with asyncio.TaskGroup() as beside:
            changes = beside.create_task(clients.change_adapters(spare, case, over))
            try:
                restored = [await one_round(server, clients, cases, goals) for _ in range(number)]
            finally:
                over.set()
        [restarts] = await clients.gauges("replica_restarts_total")
        assert restarts == {0: number, 1: number}
        return restored, changes.result()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_tiny_model_killed_and_stopped(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    adapters: dict[str, str | Path] = {
        name: random_adapter(model, tmp_path / name, 4, 8.0, target_modules("llama"), seed=i)
        for i, name in enumerate([SPARE, "other"])
    }
    cases = make_cases(24, 200, 96, [None, *adapters])
    run_alone(tmp_path / "model", adapters, cases, num_blocks=512, num_threads=1)
    options = ("--replicas", "2", "--num-blocks", "512", "--heartbeat-timeout", "2")
    with serving(tmp_path, tmp_path / "model", adapters, *options) as server:
        _, changes = asyncio.run(rounds(server, cases, (600, 1200), 1, adapters[SPARE]))
        assert changes > 1
        assert server.stop() == 0 and "Traceback" not in server.log


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_with_four_adapters(tmp_path: Path) -> None:
    """In as many rounds as ``PEFT_DIST_FAULT_ROUNDS`` says; ``make faults`` keeps what came of ten."""
    adapters, cases = smollm2()
    restored, changes = list[float](), 0
    while (left := ROUNDS - len(restored)) > 0:
        folder = tmp_path / str(left)
        folder.mkdir()
        options = ("--replicas", "2", "--num-blocks", "2048")
        with serving(folder, ensure_demo_model(), adapters, *options) as server:
            more, times = asyncio.run(
                rounds(server, cases, (1500, 3500), min(left, ROUNDS_OF_A_SERVER), adapters[SPARE])
            )
            restored, changes = restored + more, changes + times
            assert server.stop() == 0 and "Traceback" not in server.log
    # A stream that was lost, or had one token too many or too few, or another one, has failed the test.
    figures = {
        "rounds": ROUNDS,
        "streams_each_round": len(cases),
        "lost_or_different_streams": 0,
        "seconds_until_both_replicas_were_there_again": [round(each, 1) for each in restored],
        "adapters_loaded_asked_and_unloaded": changes,
    }
    print(figures)
    if folder_of_results := os.environ.get("PEFT_DIST_RESULTS"):
        write_result("faults", figures, Path(folder_of_results))
