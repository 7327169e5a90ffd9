"""Real (small) models: a request that moves with its KV has the tokens that it has where it stays."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from unittest.mock import patch

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given

from peft_dist.core.config import EngineConfig
from peft_dist.core.messages import Exported, Imported
from peft_dist.core.record_file import VARIABLE
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.recorded_moves import make_handovers
from peft_dist.runner.kv_transfers import SameHost
from peft_dist.runner.replica import Replica, build_replica
from peft_dist.sim.replay import read, replay
from peft_dist.worker.kv_server import TcpTransport
from tests.thorough import examples
from tests.tiny_models import VOCAB_SIZE, make_model, random_adapter, target_modules

torch.set_num_threads(1)
# Plain, with sliding windows in two layers of three, and in all.
KINDS = ["llama", "gemma3", "mistral"]
MAX_LEN = 60


class Running:
    """A replica, and the tokens that it drew of each request."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.drawn: dict[str, list[int]] = {}
        self.now = 0.0

    def step(self) -> None:
        self.now += 0.01
        for progress in self.replica.engine.step(self.now):
            known = self.drawn.setdefault(progress.request_id, [])
            assert progress.error is None and progress.first_index == len(known)
            known += progress.token_ids
        self.replica.engine.scheduler.blocks.check()
        self.replica.handovers.check()

    def drain(self) -> None:
        while self.replica.engine.has_work:
            if self.replica.engine.waits_for_load:
                select.select([self.replica.fileno()], [], [])
            self.step()

    def wait(self) -> Exported | Imported:
        """Until the handover under way has told its end; others go on meanwhile."""
        handovers = self.replica.handovers
        while not (reports := handovers.poll()):
            if self.replica.engine.has_work:
                self.step()
            elif not handovers.is_due:
                select.select([handovers.fileno()], [], [])
        [report] = reports
        return report

    def assert_empty(self) -> None:
        blocks = self.replica.engine.scheduler.blocks
        assert blocks.num_free == blocks.num_blocks and not self.replica.runner.records
        assert not self.replica.executor.transfers._exports


def request(name: str, prompt: list[int], params: dict[str, object], spec: object, drawn: list[int]) -> Request:
    sampling = SamplingParams(ignore_eos=True, **params)  # type: ignore[arg-type]
    return Request(name, prompt, sampling, 11, 0.0, spec, 0, list(drawn))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=KINDS)
def replicas(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[Replica]]]:
    """Two of each depth, with an adapter; what they decided is decided again from recordings when all is over."""
    root = tmp_path_factory.mktemp(f"handover_{request.param}")
    model = make_model(request.param, root / "base")
    random_adapter(model, root / "a", 4, 8.0, target_modules(request.param))
    made = []
    recorded = root / "recorded"
    recorded.mkdir()
    for depth in (0, 1):
        config = EngineConfig(
            str(root / "base"), device="cpu", dtype="float32", max_model_len=MAX_LEN, block_size=4, num_blocks=60,
            num_host_blocks=20, max_loras=2, depth=depth, max_num_batched_tokens=12,
        )  # fmt: skip
        with patch.dict(os.environ, {VARIABLE: str(recorded)}):
            made.append([build_replica(config) for _ in range(2)])
        for replica in made[-1]:
            replica.load_adapter("a", root / "a")
            # A few full blocks go ahead already.
            replica.handovers = make_handovers(replica.engine, ahead_blocks=2)
    yield made
    every = [each for pair in made for each in pair]
    for replica in every:
        replica.close()
    recordings = zip(sorted(recorded.iterdir()), every, strict=True)
    found = [replay(read(path)) for path, replica in recordings if replica.engine.num_steps]
    assert all(one.ended is None for one in found) and sum(one.moves for one in found) > 0


prompts = st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=30)
kinds = st.sampled_from(
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 8},
        {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    ]
)


@examples(5, 15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    prompt=prompts,
    params=kinds,
    length=st.integers(2, 24),
    adapted=st.booleans(),
    steps=st.integers(0, 24),
    depth=st.integers(0, 1),
    moved=st.sampled_from([True, True, True, False]),
)
def test_tokens_are_those_of_a_request_that_stays(
    replicas: list[list[Replica]],
    prompt: list[int],
    params: dict[str, object],
    length: int,
    adapted: bool,
    steps: int,
    depth: int,
    moved: bool,
) -> None:
    source, target = (Running(replica) for replica in replicas[depth])
    [spec] = source.replica.engine.adapters.values()
    params = {**params, "max_tokens": length}
    moving = request("r", prompt, params, spec if adapted else None, [])
    for running, name in ((source, "beside"), (target, "there")):
        running.replica.engine.add_request(request(name, prompt[::-1], {**params, "max_tokens": 20}, spec, []))
    source.replica.engine.add_request(moving)
    for _ in range(steps):
        source.step()
        target.step()
    source.replica.handovers.export(1, ["r"])
    exported = source.wait()
    assert isinstance(exported, Exported) and exported.error is None
    computed = sum(state.num_computed_tokens for state in exported.sequences)
    if moved and exported.sequences:
        drawn = source.drawn.get("r", [])
        twin = request("r~1", prompt, params, spec if adapted else None, drawn)
        target.replica.handovers.import_requests(1, [twin], exported.sequences)
        imported = target.wait()
        assert isinstance(imported, Imported) and imported.error is None
        assert twin.num_computed_tokens >= computed and twin.num_preemptions == 0
        target.drawn["r~1"] = list(drawn)
    source.replica.handovers.end_export(1, moved=moved)
    source.drain()
    target.drain()
    ours = target.drawn.get("r~1") or source.drawn["r"]
    for running in (source, target):
        running.assert_empty()
    alone = Running(source.replica)
    alone.replica.engine.add_request(request("alone", prompt, params, spec if adapted else None, []))
    alone.drain()
    assert ours == alone.drawn["alone"]
    assert source.drawn["beside"] == target.drawn["there"]


def test_kv_of_another_host_comes_over_tcp(replicas: list[list[Replica]]) -> None:
    source, target = (Running(replica) for replica in replicas[0])
    params: dict[str, object] = {"temperature": 0.0, "max_tokens": 20}
    prompt = [3 + i for i in range(25)]
    moving = request("r", prompt, params, None, [])
    source.replica.engine.add_request(moving)
    for _ in range(9):
        source.step()
    transports = [TcpTransport("tcp://127.0.0.1:*") for _ in replicas[0]]
    for replica, transport in zip(replicas[0], transports, strict=True):
        replica.use_transport(transport)
    source.replica.handovers.export(1, ["r"])
    exported = source.wait()
    assert isinstance(exported, Exported)
    [state] = exported.sequences
    assert state.kv and state.num_computed_tokens > 25
    # A process that does not exist here.
    far = msgspec.structs.replace(state, kv=[msgspec.structs.replace(kv, pid=1 << 30) for kv in state.kv])
    twin = request("r~1", prompt, params, None, source.drawn["r"])
    target.replica.handovers.import_requests(1, [twin], [far])
    assert target.wait() == Imported(handover=1) and twin.num_computed_tokens == state.num_computed_tokens
    source.replica.handovers.end_export(1, moved=True)
    target.drawn["r~1"] = list(source.drawn["r"])
    target.drain()
    # What was let go cannot be had any more.
    target.replica.handovers.import_requests(2, [request("r~2", prompt, params, None, [])], [far])
    assert "MemoryGoneError" in str(target.wait())
    for replica, transport in zip(replicas[0], transports, strict=True):
        replica.use_transport(SameHost())
        transport.close()
    source.replica.engine.add_request(request("alone", prompt, params, None, []))
    source.drain()
    assert target.drawn["r~1"] == source.drawn["alone"]
    source.assert_empty()
    target.assert_empty()
