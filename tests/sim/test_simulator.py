"""Virtual time: nothing is lost, everything takes what the cost model says, and a run is the same every time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig
from peft_dist.core.cost_model import CostModel
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.sim.replica import SimHardware
from peft_dist.sim.simulator import Outcome, SimCluster, Simulator

MESSAGE = 2e-4


@dataclass(frozen=True)
class Coming:
    time: float
    adapter: str | None
    prompt_tokens: int
    output_tokens: int


def cluster(
    kind: str = "dlora", replicas: int = 2, adapters: int = 4, num_blocks: int = 400, num_held: int = 0, **config: Any
) -> SimCluster:
    settings = {"max_num_seqs": 4, "max_loras": 2, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    engine = EngineConfig("simulated", **{"max_model_len": 512, **settings, **config})
    hardware = SimHardware(engine, CostModel.paper(), CostModel, num_blocks, 1 << 20, num_held)
    specs = {f"a{i}": AdapterSpec(f"a{i}", f"{i:064d}", f"a{i}", {"q": 8}, 1 << 20) for i in range(adapters)}
    options = OrchestratorOptions(engine.max_num_seqs, 1 << 16, 1, migration=kind)
    return SimCluster([hardware] * replicas, specs, options, message_seconds=MESSAGE)


def run(arrivals: list[Coming], **settings: Any) -> tuple[Simulator, list[Outcome]]:
    simulator = Simulator(cluster(**settings))
    return simulator, simulator.run(arrivals)


def arrivals(min_size: int = 1) -> st.SearchStrategy[list[Coming]]:
    one = st.builds(
        Coming,
        st.floats(0, 3),
        st.sampled_from([None, "a0", "a0", "a1", "a2", "a3"]),
        st.integers(1, 90),
        st.integers(1, 30),
    )
    return st.lists(one, min_size=min_size, max_size=30)


@settings(max_examples=40, deadline=None)
@given(
    arrivals(),
    st.sampled_from(["rr", "proactive", "dlora"]),
    st.sampled_from(["fcfs", "merge", "credit"]),
    st.integers(0, 1),
    st.sampled_from([400, 16]),
    st.integers(0, 1),
)
def test_every_request_has_its_tokens(
    coming: list[Coming], kind: str, policy: str, depth: int, num_blocks: int, num_held: int
) -> None:
    simulator, outcomes = run(
        coming, kind=kind, policy=policy, depth=depth, num_blocks=num_blocks, num_held=num_held, max_model_len=128
    )
    for outcome, arrival in zip(outcomes, coming, strict=True):
        assert outcome.error is None and outcome.tokens == arrival.output_tokens
        assert outcome.first is not None and outcome.last is not None
        # A step of the paper's takes 15 ms at least, and draws one token.
        assert outcome.first >= arrival.time + 0.015 and outcome.last >= outcome.first + 0.0149 * (outcome.tokens - 1)
    assert simulator.core.num_unfinished == 0
    for replica in simulator.replicas:
        replica.engine.scheduler.blocks.check()
        assert replica.engine.stats().num_free_blocks == num_blocks


def test_a_lone_request_takes_its_steps_and_nothing_else() -> None:
    """60 prompt tokens in one step, then 9 more of 15 ms, as the base's weights are what merged ones are."""
    _, [outcome] = run([Coming(1.0, None, 60, 10)])
    assert outcome.first == pytest.approx(1.0 + 0.015 + 2 * MESSAGE, abs=3e-4)
    assert outcome.last == pytest.approx(1.0 + 10 * 0.015 + 2 * MESSAGE, abs=3e-4)


def test_with_a_step_in_flight_the_host_takes_no_time_of_the_device() -> None:
    """So do reports: of 30 decode steps on a device that needs 15 ms each the last ends after 30 of those."""
    _, [outcome] = run([Coming(1.0, None, 8, 30)], depth=1)
    assert outcome.last == pytest.approx(1.0 + 30 * 0.015 + 2 * MESSAGE, abs=1e-3)


def test_an_adapters_steps_are_longer_until_it_is_merged() -> None:
    """fcfs never merges: 27 ms a step; merge does at once, for 20 ms, and then 15 ms a step."""
    load = 1e-3 + 1e-10 * (1 << 20)
    [unmerged] = run([Coming(1.0, "a0", 8, 100)], policy="fcfs", replicas=1)[1]
    assert unmerged.last == pytest.approx(1.0 + load + 100 * 0.027, abs=2e-3)
    [merged] = run([Coming(1.0, "a0", 8, 100)], policy="merge", replicas=1)[1]
    assert merged.last == pytest.approx(1.0 + load + 0.020 + 100 * 0.015, abs=2e-3)


@settings(max_examples=10, deadline=None)
@given(arrivals(min_size=8))
def test_a_run_is_the_same_every_time(coming: list[Coming]) -> None:
    first, second = (run(coming, policy="credit", depth=1) for _ in range(2))
    assert first[1] == second[1]
    assert [r.engine.num_steps for r in first[0].replicas] == [r.engine.num_steps for r in second[0].replicas]


def test_torch_is_not_imported() -> None:
    code = "import sys, peft_dist.sim.simulator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
