"""On a real (small) model: a request's tokens are those it gets alone, whatever happens around it."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given

from peft_dist import LLM, SamplingParams
from peft_dist.core.request import Request
from peft_dist.engine.engine import Engine
from peft_dist.runner.replica import Replica
from tests.thorough import examples
from tests.tiny_models import VOCAB_SIZE, make_model, random_adapter, target_modules

torch.set_num_threads(1)
# Plain, with sliding windows, and with learned positions.
KINDS = ["llama", "gemma3", "opt"]
NUM_BLOCKS, BLOCK_SIZE, MAX_LEN = 15, 4, 60


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(f"any_batch_{family}")
    model = make_model(family, root / "base")
    for number in range(3):
        random_adapter(model, root / f"a{number}", 2 + 3 * number, 8.0, target_modules(family), seed=number)
    return root


@pytest.fixture(scope="module")
def llms(folder: Path) -> Iterator[dict[tuple[int, str], LLM]]:
    """One LLM for each depth and kind of preemption, with few blocks, and one with room for everything."""
    adapters = {f"a{i}": folder / f"a{i}" for i in range(3)}
    options = {"device": "cpu", "dtype": "float32", "max_model_len": MAX_LEN, "block_size": BLOCK_SIZE, "max_loras": 2}
    made = {
        (depth, preemption): LLM(
            folder / "base", adapters, depth=depth, preemption=preemption, num_blocks=NUM_BLOCKS,
            num_host_blocks=30 if preemption == "swap" else 0, **options,
        )
        for depth in (0, 1)
        for preemption in ("recompute", "swap")
    }  # fmt: skip
    made[0, "room"] = LLM(folder / "base", adapters, num_blocks=400, enable_prefix_caching=False, **options)
    yield made
    for llm in made.values():
        llm.close()


@pytest.fixture
def check_each_step(llms: dict[tuple[int, str], LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of every engine is followed by a look at the blocks."""
    for llm in llms.values():
        engine = replica_of(llm).engine

        def step(now: float, engine: Engine = engine, original: Callable[..., Any] = engine.step) -> Any:
            progress = original(now)
            engine.scheduler.blocks.check()
            return progress

        monkeypatch.setattr(engine, "step", step)


def replica_of(llm: LLM) -> Replica:
    return llm._open


params = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 18), "temperature": st.sampled_from([0.0, 0.8]), "seed": st.integers(0, 3)},
    optional={
        "presence_penalty": st.sampled_from([0.7]),
        "repetition_penalty": st.sampled_from([1.3]),
        "min_tokens": st.just(1),
        "top_k": st.integers(1, 30),
        "top_p": st.floats(0.3, 1.0),
        "logprobs": st.integers(0, 3),
        "ignore_eos": st.booleans(),
    },
)
prompts = st.tuples(st.integers(1, 3), st.integers(1, 40)).map(
    lambda p: [3 + (i * p[0]) % (VOCAB_SIZE - 3) for i in range(p[1])]
)
requests = st.lists(st.tuples(prompts, st.integers(-1, 2), params, st.integers(0, 6)), min_size=1, max_size=7)


def alone(llm: LLM, prompt: list[int], adapter: int, options: dict[str, object]) -> list[int]:
    name = None if adapter < 0 else f"a{adapter}"
    [output] = llm.generate([prompt], SamplingParams(**options), name, use_tqdm=False)
    return output.outputs[0].token_ids


@examples(5, 14, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    asked=requests,
    aborts=st.dictionaries(st.integers(0, 6), st.integers(0, 12), max_size=2),
    depth=st.integers(0, 1),
    preemption=st.sampled_from(["recompute", "swap"]),
    max_tokens=st.integers(1, 50),
    max_seqs=st.integers(1, 7),
)
def test_tokens_are_those_of_a_request_alone(
    llms: dict[tuple[int, str], LLM], asked, aborts, depth, preemption, max_tokens, max_seqs
) -> None:
    replica = replica_of(llms[depth, preemption])
    engine = replica.engine
    limits = engine.scheduler.limits
    engine.scheduler.limits = type(limits)(MAX_LEN, max_seqs, max_tokens, preemption=preemption)
    specs = {spec.name: spec for spec in llms[depth, preemption].adapters}
    tokens: dict[str, list[int]] = {}
    aborted = set()
    for now in range(2000):
        for number, (prompt, adapter, options, arrival) in enumerate(asked):
            if arrival == now:
                spec = specs.get(f"a{adapter}")
                sampling = SamplingParams(**options)
                engine.add_request(Request(f"r{number}", prompt, sampling, options["seed"], 0.0, spec))
                tokens[f"r{number}"] = []
        for number, when in aborts.items():
            if when == now and f"r{number}" in engine.requests:
                engine.abort([f"r{number}"])
                aborted.add(f"r{number}")
        for progress in engine.step(0.0):
            assert progress.error is None and progress.first_index == len(tokens[progress.request_id])
            tokens[progress.request_id] += progress.token_ids
        engine.scheduler.blocks.check()
        engine.scheduler.adapters.check()
        if engine.waits_for_load:
            assert select.select([replica.fileno()], [], [], 60)[0], "a load got lost"
        if now > 12 and not engine.has_work:
            break
    engine.scheduler.limits = limits
    assert not engine.has_work and not replica.runner.records and not replica.runner._unfinished
    assert engine.scheduler.blocks.num_free == NUM_BLOCKS
    for number, (prompt, adapter, options, _) in enumerate(asked):
        expected, got = alone(llms[0, "room"], prompt, adapter, options), tokens[f"r{number}"]
        assert got == (expected[: len(got)] if f"r{number}" in aborted else expected)


@pytest.mark.usefixtures("check_each_step")
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_forced_preemption_changes_nothing(llms: dict[tuple[int, str], LLM], depth: int, preemption: str) -> None:
    llm = llms[depth, preemption]
    before = replica_of(llm).engine.stats()
    batch = [[3 + i + k for i in range(12)] for k in range(5)]
    names = ["a0", None, "a1", "a0", "a1"]
    sampling = SamplingParams(max_tokens=30, temperature=0.7, seed=5, ignore_eos=True)
    outputs = llm.generate(batch, sampling, names, use_tqdm=False)
    after = replica_of(llm).engine.stats()
    assert after.num_preemptions > before.num_preemptions
    expected = llms[0, "room"].generate(batch, sampling, names, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_shared_prefix_changes_nothing(llms: dict[tuple[int, str], LLM], depth: int) -> None:
    llm = llms[depth, "recompute"]
    prompt = [7 + i % 13 for i in range(22)]
    sampling = SamplingParams(max_tokens=8, temperature=0.0, n=2, ignore_eos=True)
    for name, cached in (("a2", 0), ("a2", 20), (None, 0), (None, 20)):
        [output] = llm.generate([prompt], sampling, name, use_tqdm=False)
        [expected] = llms[0, "room"].generate([prompt], sampling, name, use_tqdm=False)
        assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs]
        assert output.num_cached_tokens == cached


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_thousand_mixed_requests_leave_nothing_behind(llms: dict[tuple[int, str], LLM]) -> None:
    llm = llms[1, "swap"]
    replica = replica_of(llm)
    batch = [[3 + (i * k) % (VOCAB_SIZE - 3) for i in range(1 + k % 19)] for k in range(1000)]
    names = [(None, "a0", "a1", "a2")[k % 4] for k in range(1000)]
    sampling = [
        SamplingParams(max_tokens=1 + k % 5, temperature=k % 2, seed=k, n=1 + (k % 50 == 0)) for k in range(1000)
    ]
    outputs = llm.generate(batch, sampling, names, use_tqdm=False)
    assert len(outputs) == 1000 and all(output.finished for output in outputs)
    scheduler = replica.engine.scheduler
    assert scheduler.blocks.num_free == NUM_BLOCKS
    assert not replica.runner.records and not replica.engine.requests and not scheduler.adapters._users
    scheduler.blocks.check()
    replica.store.pool.check()
