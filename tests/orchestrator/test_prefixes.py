"""Requests go back to the replica that has computed what they begin with, unless it has too much to do."""

from __future__ import annotations

import random
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import peft_dist.core.block_hash
from peft_dist.core.block_hash import chain_hashes
from peft_dist.core.messages import AddRequest, Ready, SequenceProgress
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator import prefixes
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.prefixes import MOST_HASHED, Prefixes
from peft_dist.orchestrator.records import Replica, RequestRecord, SequenceRecord
from tests.engine.test_engine import drain, make_engine, make_request
from tests.orchestrator.test_core import tokens
from tests.orchestrator.world import mini_spec
from tests.worker.fake_replica import fake_model

BLOCK, ROOM = 4, 12
MODEL = replace(fake_model("org/base", max_model_len=20_000), block_size=BLOCK, num_blocks=100_000)


def record(
    prompt: list[int], adapter: str | None = None, replica_id: int | None = None, **params: int
) -> RequestRecord:
    spec = mini_spec(adapter, adapter) if adapter else None
    return RequestRecord("r", prompt, SamplingParams(**params), 1, spec, 0.0, replica_id=replica_id)


def replica(replica_id: int, num_blocks: int = ROOM) -> Replica:
    return Replica(replica_id, 1, model=replace(MODEL, num_blocks=num_blocks))


def test_only_the_same_content_on_the_same_replica_counts() -> None:
    known, one, other = Prefixes(True), replica(0), replica(1)
    prompt = list(range(18))
    known.sent(record(prompt), one)
    assert known.cached(record(prompt), one) == 16 and known.cached(record(prompt), other) == 0
    assert known.cached(record(prompt[:16]), one) == 15, "one token must be computed"
    assert known.cached(record([*prompt[:9], 99, *prompt[10:]]), one) == 8
    assert known.cached(record([99, *prompt]), one) == 0
    assert known.cached(record(prompt, "red"), one) == 0, "KV of an adapter is its own"
    assert known.cached(record(prompt, prompt_logprobs=1), one) == 0, "scores need all of it"
    known.sent(record(prompt, "red"), one)
    assert known.cached(record(prompt, "red"), one) == 16
    known.forget(0)
    assert known.cached(record(prompt), one) == 0 and known.num_known(0) == 0


def test_what_was_drawn_is_part_of_the_next_turn() -> None:
    known, one = Prefixes(True), replica(0)
    prompt, answer = [1, 2, 3, 4, 5], list(range(10, 19))
    asked = record(prompt, "red", replica_id=0)
    known.sent(asked, one)
    sequence = SequenceRecord("r-0", 0, output_token_ids=answer)
    known.ended(asked, sequence)
    again = record([*prompt, *answer, 7, 7], "red")
    assert known.cached(again, one) == 12, "13 tokens have KV: of the last one drawn there is none"
    known.ended(record(prompt, "red"), sequence)  # Nobody had it: nothing is known of anybody.
    assert known.num_known(0) == 3


def test_what_a_replica_did_not_find_has_gone_and_so_has_what_was_used_before_it() -> None:
    known, one = Prefixes(True), replica(0, 100)
    oldest, old, new = ([kind] * 16 for kind in (1, 2, 3))

    def run(prompt: list[int], found: int) -> None:
        asked = record(prompt, replica_id=0)
        known.sent(asked, one)
        known.found(asked, found)
        known.ended(asked, SequenceRecord("r-0", 0, output_token_ids=[9]))

    def expected() -> list[int]:
        return [known.cached(record([*prompt, 0]), one) for prompt in (oldest, old, new)]

    for prompt in (oldest, old, new):
        run(prompt, 0)
    assert expected() == [16, 16, 16]
    # Two of its blocks are there: those before them in a chain go last. Now it has all of them again.
    run([*old, 0], 8)
    assert expected() == [0, 16, 16]
    run([*new, 0], 16)
    assert expected() == [0, 16, 16], "as it was thought to be"
    # One that found more than was known tells nothing of others.
    known.forget(0)
    run(new, 0)
    run(old, 12)
    assert expected() == [0, 16, 16]


def test_only_what_was_surely_computed_can_be_missed() -> None:
    known, one = Prefixes(True), replica(0, 100)
    other, shared = record([1] * 16, replica_id=0), [2] * 16
    known.sent(other, one)
    known.found(other, 0)
    first, second = record([*shared, 3], replica_id=0), record([*shared, 4], replica_id=0)
    # Both were sent before anybody had computed what they share.
    known.sent(first, one)
    known.sent(second, one)
    known.found(first, 0)
    known.found(second, 0)
    assert known.cached(record([1] * 17), one) == 16
    # Scores need all of a prompt, whatever is there; and what moved on with its KV was looked up elsewhere.
    scored = record([1] * 17, replica_id=0, prompt_logprobs=1)
    known.sent(scored, one)
    known.found(scored, 0)
    moved = record([*shared, 5], replica_id=0)
    known.sent(moved, one, computes=False)
    known.found(moved, 0)
    # The last token of a prompt is always computed, and with it the block that it fills.
    whole = record([1] * 16, replica_id=0)
    known.sent(whole, one)
    known.found(whole, 12)
    assert known.cached(record([1] * 17), one) == known.cached(record([*shared, 6]), one) == 16


CHAINS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), max_size=30)


@given(CHAINS, st.integers(1, ROOM))
def test_memory_is_bounded_and_no_block_outlives_those_before_it(prompts: list[list[int]], room: int) -> None:
    known, one = Prefixes(True), replica(0, room)
    for prompt in prompts:
        known.sent(record(prompt), one)
        assert known.num_known(0) <= room
        held = known._known[0].blocks
        for each in prompts:
            names = chain_hashes(b"", each, BLOCK)
            is_known = [name in held for name in names]
            assert is_known == sorted(is_known, reverse=True)
            assert known.cached(record(each), one) == min(sum(is_known) * BLOCK, len(each) - 1)
        assert known.cached(record(prompt), one) == min(min(len(prompt) // BLOCK, room) * BLOCK, len(prompt) - 1)


def test_of_a_long_prompt_only_the_start_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    known, one = Prefixes(True), replica(0, 100_000)
    monkeypatch.setattr(prefixes, "MOST_BLOCKS", 600)
    long = [3] * (MOST_HASHED + 50) * BLOCK
    asked = record(long, replica_id=0)
    known.sent(asked, one)
    assert len(asked.prompt_hashes or ()) == MOST_HASHED and known.num_known(0) == 600
    known.ended(asked, SequenceRecord("r-0", 0, output_token_ids=[1] * 100))
    assert known.num_known(0) == 600


class Cluster:
    """An orchestrator of two replicas that cost the same, and the answers to what they are asked."""

    def __init__(self, number: int = 2, prefix_caching: bool = True) -> None:
        self.core = Orchestrator(OrchestratorOptions(64, 4096, seed=0, prefix_caching=prefix_caching))
        for replica_id in range(number):
            self.start(replica_id)
        self.count = 0

    def start(self, replica_id: int) -> None:
        epoch = self.core.add_replica(replica_id, 0.0).epoch
        self.core.observe(replica_id, epoch, Ready(model=MODEL, pid=1, costs=StepCosts()), 0.0)

    def ask(self, prompt: list[int], max_tokens: int = 8) -> tuple[str, int]:
        """Returns the request and the replica that got it."""
        self.count += 1
        name = f"r{self.count}"
        [out] = self.core.submit(NewRequest(name, prompt, SamplingParams(max_tokens=max_tokens)), 0.0)
        assert isinstance(out.command, AddRequest)
        return name, out.replica_id

    def answer(self, name: str, replica_id: int, answer: list[int], finish: str | None = "stop") -> None:
        self.core.observe(replica_id, self.core.replicas[replica_id].epoch, tokens(f"{name}-0", answer, 0, finish), 1.0)

    def turn(self, prompt: list[int], rng: random.Random) -> tuple[int, list[int]]:
        """A whole turn of a chat: who answered it, and the conversation so far."""
        name, replica_id = self.ask(prompt)
        answer = [rng.randrange(1000) for _ in range(8)]
        self.answer(name, replica_id, answer)
        return replica_id, prompt + answer


def chats(cluster: Cluster) -> tuple[list[int], list[int]]:
    """Who had the first turn of each of many chats, and who the second one."""
    rng = random.Random(1)
    first, second, open_chats = [], [], []
    for _ in range(40):
        prompt = [rng.randrange(1000) for _ in range(200)]
        # The other one has something to do now and then, so that chats are spread.
        background = [cluster.ask([rng.randrange(1000)]) for _ in range(rng.randrange(3))]
        replica_id, said = cluster.turn(prompt, rng)
        first.append(replica_id)
        open_chats.append(said)
        for name, where in background:
            cluster.answer(name, where, [1])
    for said in open_chats:
        second.append(cluster.turn([*said, 1, 2, 3], rng)[0])
    return first, second


def test_second_turns_go_back_where_loads_are_alike() -> None:
    first, second = chats(Cluster())
    assert set(first) == {0, 1} and first == second
    assert chats(Cluster()) == (first, second), "nothing depends on the process or the time"
    _, without = chats(Cluster(prefix_caching=False))
    assert without != first


def test_they_go_elsewhere_where_that_ends_sooner() -> None:
    cluster, rng = Cluster(), random.Random(2)
    home, said = cluster.turn([rng.randrange(1000) for _ in range(400)], rng)
    cluster.core.drain_replica(1 - home, 0.0)
    for _ in range(200):
        assert cluster.ask([rng.randrange(1000) for _ in range(50)], 200)[1] == home
    cluster.core.resume_replica(1 - home, 0.0)
    assert cluster.ask([*said, 1, 2, 3])[1] == 1 - home


def test_a_replica_that_is_started_again_has_nothing() -> None:
    cluster, rng = Cluster(), random.Random(3)
    home, said = cluster.turn([rng.randrange(1000) for _ in range(400)], rng)
    known = cluster.core._requests.prefixes
    assert known.num_known(home) == 101 and known.num_known(1 - home) == 0
    cluster.core.lose_replica(home, cluster.core.replicas[home].epoch, "it died", 1.0)
    assert known.num_known(home) == 0
    cluster.start(home)
    name, other = cluster.ask([*said, 1])
    assert (known.num_known(other), known.num_known(1 - other)) == (102, 0)
    # Its requests go on elsewhere, and from then on that is where their prefix is.
    cluster.core.lose_replica(other, cluster.core.replicas[other].epoch, "it died", 1.0)
    assert known.num_known(1 - other) == 102 and cluster.core._requests.get(name) is not None


def test_what_is_expected_in_the_cache_is_no_work() -> None:
    cluster, rng = Cluster(), random.Random(4)
    home, said = cluster.turn([rng.randrange(1000) for _ in range(400)], rng)
    cluster.ask([*said, 1, 2, 3])
    backlog = cluster.core._requests.backlog(home)
    assert backlog.prefill_tokens == len(said) + 3 - 404


def test_nothing_is_hashed_for_one_replica_or_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[bytes]:
        raise AssertionError("hashed for nothing")

    monkeypatch.setattr(prefixes, "chain_hashes", fail)
    monkeypatch.setattr(peft_dist.core.block_hash, "chain_hashes", fail)
    for cluster in (Cluster(1), Cluster(2, prefix_caching=False)):
        cluster.turn([5] * 100, random.Random(0))
    with pytest.raises(AssertionError, match="for nothing"):
        Cluster(2).turn([5] * 100, random.Random(0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 30), st.integers(0, 2), st.integers(1, 9)), max_size=10),
    st.integers(0, 1),
)
def test_with_room_for_all_it_is_what_the_engine_finds(asked: list[tuple[int, int, int, int]], depth: int) -> None:
    """``asked``: The prompt's kind and length, an adapter, and how many tokens are drawn; below 0 it goes on with an
    earlier conversation."""
    engine = make_engine(num_blocks=1000, depth=depth)
    known, where = Prefixes(True), replica(0, 1000)
    said: list[list[int]] = []
    for number, (kind, length, adapter, count) in enumerate(asked):
        fresh = [1 + (i * (abs(kind) + 3)) % 90 for i in range(length)]
        prompt = said[kind % len(said)] + fresh if kind < 0 and said else fresh
        request = make_request(f"r{number}", prompt, adapter, count, ignore_eos=True)
        mine = RequestRecord(request.request_id, prompt, request.params, 1, request.adapter, 0.0, replica_id=0)
        expected = known.cached(mine, where)
        known.sent(mine, where)
        engine.add_request(request)
        got: dict[str, list[SequenceProgress]] = {}
        drain(engine, got)
        progress = got[request.request_id]
        # The engine counts whole blocks of what it need not compute.
        assert progress[-1].num_cached_tokens == expected // BLOCK * BLOCK
        drawn = [token for each in progress for token in each.token_ids]
        known.ended(mine, SequenceRecord(request.request_id, 0, output_token_ids=drawn))
        said.append(prompt + drawn)


def believed_in_vain(seed: int, depth: int, *, corrected: bool) -> int:
    """Tokens that a small engine, thought to have much room, was expected to have and had not, over some chats."""
    engine = make_engine(num_blocks=24, depth=depth)
    known, where, rng = Prefixes(True), replica(0, 1000), random.Random(seed)
    said: list[list[int]] = []
    in_vain = 0
    for number in range(60):
        old = rng.choice(said) if said and rng.random() < 0.6 else []
        prompt = (old + [rng.randrange(90) for _ in range(rng.randrange(1, 30))])[:50]
        request = make_request(f"r{number}", prompt, max_tokens=rng.randrange(1, 20), ignore_eos=True)
        mine = RequestRecord(request.request_id, prompt, request.params, 1, None, 0.0, replica_id=0)
        expected = known.cached(mine, where) // BLOCK * BLOCK
        known.sent(mine, where)
        engine.add_request(request)
        got: dict[str, list[SequenceProgress]] = {}
        drain(engine, got)
        progress = got[request.request_id]
        in_vain += max(expected - progress[0].num_cached_tokens, 0)
        if corrected:
            before = set(known._known[0].blocks)
            known.found(mine, progress[0].num_cached_tokens)
            # What this one has drawn since may be what had gone.
            dropped = before - known._known[0].blocks.keys() - set(request.block_hashes)
            assert not dropped & engine.scheduler.blocks._block_of.keys(), "it is there"
        drawn = [token for each in progress for token in each.token_ids]
        known.ended(mine, SequenceRecord(request.request_id, 0, output_token_ids=drawn))
        said.append(prompt + drawn)
    return in_vain


@pytest.mark.parametrize("depth", [0, 1])
def test_less_is_believed_in_vain_and_nothing_is_taken_back_that_is_there(depth: int) -> None:
    without, corrected = (
        sum(believed_in_vain(seed, depth, corrected=corrected) for seed in range(4)) for corrected in (False, True)
    )
    assert 0 < corrected < 0.6 * without


def test_the_next_one_goes_by_what_the_last_one_found() -> None:
    cluster, rng = Cluster(), random.Random(5)
    prompts = [[rng.randrange(1000) for _ in range(400)] for _ in range(2)]
    cluster.core.drain_replica(1, 0.0)
    saids = [cluster.turn(prompt, rng)[1] for prompt in prompts]
    name, home = cluster.ask([*saids[1], 1, 2, 3])
    assert home == 0
    cluster.core.resume_replica(1, 0.0)
    backlog = cluster.core._requests.backlog(0)
    assert backlog.prefill_tokens < 20, "it is thought to be there"
    # It was not, so that the older conversation is not there either: it goes where there is less to do.
    cluster.answer(name, home, [7], finish=None)
    _, other = cluster.ask([*saids[0], 1, 2, 3], 200)
    assert other == 1
