"""Requests that move with their KV between replicas of two ranks each: every rank brings its own part."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.moving_ranks import Begin, Drain, End, Export, Import, Order, Told
from tests.ports import free_ports
from tests.ranks import TIMEOUT
from tests.tiny_models import VOCAB_SIZE, make_model, random_adapter, target_modules

PROMPT = [3 + (7 * i) % (VOCAB_SIZE - 3) for i in range(25)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 8, "repetition_penalty": 1.2, "max_tokens": 24}
# Which export of the second replica finds no memory, on the rank that follows.
FAILS = 3

pytestmark = pytest.mark.slow


class TwoRanks:
    """A replica of two processes."""

    def __init__(self, stack: ExitStack, folder: Path, depth: int, fails: int) -> None:
        [port] = free_ports(1)
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.moving_ranks", str(folder / "base"), str(folder / "a"), str(depth)]
        self.ranks = [
            subprocess.Popen(
                [*command, str(fails)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        for rank in self.ranks:
            stack.callback(rank.kill)
        self._in, self._out = self.ranks[0].stdin, self.ranks[0].stdout

    def hear(self, kind: Any) -> Any:
        assert self._out is not None
        return msgspec.json.decode(self._out.readline(), type=kind)

    def say(self, order: Order) -> Told:
        assert self._in is not None
        self._in.write(msgspec.json.encode(order) + b"\n")
        self._in.flush()
        told: Told = self.hear(Told)
        return told

    def close(self) -> None:
        """Each rank has let all exports go, or it ends with an error."""
        assert self._in is not None
        self._in.close()
        assert [rank.wait(TIMEOUT) for rank in self.ranks] == [0, 0]


@pytest.fixture(scope="module", params=[0, 1])
def replicas(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[TwoRanks]]:
    """Two, at a depth."""
    folder = tmp_path_factory.mktemp("rank_moves")
    model = make_model("gemma3", folder / "base")
    random_adapter(model, folder / "a", 4, 8.0, target_modules("gemma3"))
    with ExitStack() as stack:
        made = [TwoRanks(stack, folder, request.param, fails) for fails in (0, FAILS)]
        block_bytes = {tuple(replica.hear(list[int])) for replica in made}
        assert block_bytes == {(2 * sum_of_parts(model), 2)}
        yield made
        for replica in made:
            replica.close()


def sum_of_parts(model: Any) -> int:
    """Bytes of one rank's part of a block of 4 tokens in float32: half of the key heads of each layer."""
    config = model.config
    return int(2 * 4 * config.num_hidden_layers * config.num_key_value_heads // 2 * config.head_dim * 4)


def test_tokens_are_those_of_a_request_that_stays(replicas: list[TwoRanks]) -> None:
    source, target = replicas
    for number, (params, adapted) in enumerate([(GREEDY, True), (SAMPLED, False)]):
        begun = Begin(f"r{number}", PROMPT, params, adapted, 9)
        source.say(begun)
        exported = source.say(Export(begun.name))
        assert exported.error is None and exported.state is not None
        state = exported.state
        assert state.num_computed_tokens >= len(PROMPT) and all(len(kv.others) == 1 for kv in state.kv)
        assert all(kv.pid != kv.others[0].pid for kv in state.kv)
        name = f"{begun.name}~1"
        assert target.say(Import(name, begun, exported.drawn, state)).error is None
        source.say(End(moved=True))
        moved = target.say(Drain(name)).drawn
        assert moved == alone(source, begun)
        if number == 0:
            # What one rank cannot open is imported nowhere, and its blocks are free.
            gone = msgspec.structs.replace(state.kv[0], others=[msgspec.structs.replace(state.kv[0], token="x" * 32)])
            broken = msgspec.structs.replace(state, kv=[gone, *state.kv[1:]])
            assert "MemoryGoneError" in str(target.say(Import("broken", begun, exported.drawn, broken)).error)
            target.say(Import("again", begun, exported.drawn, None))
            assert target.say(Drain("again")).drawn == moved


def test_an_export_that_fails_on_one_rank_leaves_the_request_where_it_was(replicas: list[TwoRanks]) -> None:
    source, target = replicas
    # Too short for blocks that are copied ahead.
    begun = [Begin(f"s{i}", PROMPT[:3], SAMPLED, True, 1) for i in range(3)]
    errors = []
    for each in begun:
        target.say(each)
        exported = target.say(Export(each.name))
        errors.append(exported.error)
        assert (exported.state is None) == (exported.error is not None)
        target.say(End(moved=False))
        assert target.say(Drain(each.name)).drawn == alone(source, each)
    assert errors == [None, None, "OSError: no memory"]


def alone(replica: TwoRanks, begun: Begin) -> list[int]:
    replica.say(Begin(f"alone {begun.name}", begun.prompt, begun.params, begun.adapted, 1))
    return replica.say(Drain(f"alone {begun.name}")).drawn
