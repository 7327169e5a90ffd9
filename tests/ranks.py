"""Replicas whose weights are split over processes, for tests: the same generations on every rank of a launch.

``python -m tests.ranks CASES OUT`` is one rank. Rank 0 answers, the others follow it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.ports import free_ports

TIMEOUT = 280


class Case(msgspec.Struct):
    """One model that is loaded and asked.

    Attributes:
        options: Of ``LLM``, and of the other ranks' ``EngineConfig``.
        rounds: Each generates for (prompt, adapter) pairs at once; an adapter in ``adapters`` is loaded before the
            round in which it comes first.
        sampling: Fields of ``SamplingParams``.
        lot: Seeds a policy that decides by lot what is merged and who runs; None: the options' policy.
    """

    model: str
    adapters: dict[str, str]
    rounds: list[list[tuple[list[int], str | None]]]
    sampling: dict[str, Any]
    options: dict[str, Any] = {}
    lot: int | None = None


class Found(msgspec.Struct):
    """What a rank saw of a case.

    Attributes:
        tokens: By round and request, of rank 0.
        shapes: Of the weights that it has, by name.
        kv_shape: Of the first layer's cache of keys.
        slots: Ranks of the adapters in the pool when all was done.
        merged: What the weights held then.
    """

    tokens: list[list[list[int]]]
    shapes: dict[str, list[int]]
    kv_shape: list[int]
    slots: dict[int, list[int]]
    merged: str | None
    num_switches: int


def run_cases(cases: list[Case], folder: Path, size: int = 2) -> list[list[Found]]:
    """By rank, then by case."""
    (folder / "cases.json").write_bytes(msgspec.json.encode(cases))
    world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    # One for each meeting: on a port used before, a rank that is early meets the store that is about to close.
    ports = [str(port) for port in free_ports(len(cases))]
    outs = [folder / f"rank{rank}.json" for rank in range(size)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(folder / "cases.json"), str(out), *ports],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, out in enumerate(outs)
    ]
    try:
        codes = [rank.wait(TIMEOUT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * size
    return [msgspec.json.decode(out.read_bytes(), type=list[Found]) for out in outs]


def _look(replica: Any, tokens: list[list[list[int]]]) -> Found:
    model = replica.runner.model
    shapes = {name.replace(".base_layer", ""): list(weight.shape) for name, weight in model.named_parameters()}
    pool = replica.runner.store.pool
    pool.check()
    slots = {slot: list(pool.ranks(slot).values()) for slot in replica.executor._slots.values()}
    cache = replica.runner.kv.caches[0].key
    switches = replica.engine.num_switches
    return Found(tokens, shapes, list(cache.shape), slots, replica.executor.merged_adapter(), switches)


def _lead(case: Case) -> Found:
    from peft_dist import LLM, SamplingParams

    llm = LLM(case.model, **case.options)
    if case.lot is not None:
        from tests.e2e.test_policies import AnyMode

        llm._open.engine.scheduler.policy = AnyMode(case.lot)
    known: set[str] = set()
    tokens = []
    for round_ in case.rounds:
        for name in dict.fromkeys(name for _, name in round_ if name is not None and name not in known):
            llm.load_adapter(case.adapters[name], name)
            known.add(name)
        params = SamplingParams(**case.sampling)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in round_], params, [name for _, name in round_], use_tqdm=False
        )
        tokens.append([output.outputs[0].token_ids for output in outputs])
    found = _look(llm._open, tokens)
    llm.close()
    return found


def _follow(case: Case) -> Found:
    from peft_dist.core.config import EngineConfig
    from peft_dist.runner.replica import build_replica

    replica = build_replica(EngineConfig(model=case.model, **case.options))
    replica.follow()
    return _look(replica, [])


def main() -> None:
    cases, out, *ports = sys.argv[1:]
    run = _follow if int(os.environ["RANK"]) else _lead
    found = []
    for case, port in zip(msgspec.json.decode(Path(cases).read_bytes(), type=list[Case]), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        found.append(run(case))
    Path(out).write_text(json.dumps(msgspec.to_builtins(found)))


if __name__ == "__main__":
    main()
