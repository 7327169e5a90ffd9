"""Merged, unmerged or merged with corrections, switched at any moment: every request gets PEFT's tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.policy.batching import BASE, Choice, QueueState
from tests.e2e.known import Known
from tests.e2e.test_exactness import NAMES, NUM_TOKENS, PROMPTS
from tests.oracle import Recorder, assert_close_logits, assert_identical, common_prefix

torch.set_num_threads(1)


class AnyMode:
    """A policy that decides by lot: the mode, who runs, and whether others may join a merged batch."""

    credits: dict[str, float] = {}  # noqa: RUF012  (part of the protocol; nothing writes it)

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.modes: set[str] = set()

    def choose(self, state: QueueState) -> Choice:
        runnable = [c for c in state.candidates if c.num_new_tokens and c.is_resident]
        adapters = sorted({c.adapter for c in runnable if c.adapter != BASE and state.mergeable(c.adapter)})
        merged = self.rng.choice([None, *adapters])
        if merged is not None and (not state.can_host(merged) or self.rng.random() < 0.5):
            runnable = [c for c in runnable if c.adapter == merged]
        self.rng.shuffle(runnable)
        chosen = runnable[: min(state.max_num_seqs, self.rng.randint(1, 8))]
        if merged is not None and all(c.adapter != merged for c in chosen):
            merged = None
        others = any(c.adapter != merged for c in chosen)
        self.modes.add("unmerged" if merged is None else "corrected" if others else "merged")
        return Choice(merged, chosen, "lot")

    def ran(self, state: QueueState, choice: Choice, scheduled: Collection[str]) -> None:
        """Nothing is learned."""

    def forget(self, request_ids: Iterable[str]) -> None:
        """Nothing is kept."""

    def forget_adapter(self, adapter: str) -> None:
        """Nothing is kept."""

    def report(self) -> dict[str, float]:
        return {}


def check(llm: LLM, of: Known) -> None:
    recorder = Recorder(llm)
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    ties = 0
    for output, prompt, name in zip(llm.generate(PROMPTS, greedy, NAMES, use_tqdm=False), PROMPTS, NAMES, strict=True):
        adapter = None if name == "__base__" else name
        answer = of.answer(prompt, adapter, NUM_TOKENS)
        ties += assert_identical(output.outputs[0].token_ids, answer, of.oracle, prompt, adapter)
        same = common_prefix(output.outputs[0].token_ids, answer.tokens)
        assert_close_logits(
            [row.cpu() for row in recorder.logits[output.request_id]], answer, min(same + 1, NUM_TOKENS)
        )
    assert ties == 0


@pytest.mark.parametrize("way", ["shadow", "host"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_any_mode_at_any_moment_gives_pefts_answers(
    device: str, family: str, way: str, known: Callable[[str], Known]
) -> None:
    of = known(family)
    options = {"device": device, "dtype": "float32", "num_blocks": 64, "max_num_batched_tokens": 40, "max_num_seqs": 6}
    seen: set[str] = set()
    for depth in (0, 1):
        with LLM(of.base, of.adapters, merge=way, depth=depth, **options) as llm:
            policy = AnyMode(depth)
            llm._open.engine.scheduler.policy = policy
            check(llm, of)
            assert llm._open.engine.num_switches > 3
            seen |= policy.modes
    # Embeddings that lm_head shares cannot be merged in place, and everything of these adapters may be refused then.
    assert seen >= {"unmerged", "merged", "corrected"}


@pytest.mark.parametrize(
    ("policy", "exec_type"),
    [("fcfs", "dlora"), ("merge", "dlora"), ("credit", "dlora"), (None, "peft"), (None, "vllm")],
)
def test_policies_give_pefts_answers(policy: str | None, exec_type: str, known: Callable[[str], Known]) -> None:
    of = known("llama")
    with LLM(
        of.base, of.adapters, device="cpu", dtype="float32", num_blocks=64, max_num_seqs=6, policy=policy,
        exec_type=exec_type,
    ) as llm:  # fmt: skip
        check(llm, of)
        if policy != "credit":
            assert (llm._open.engine.num_merged_steps > 0) == (policy != "fcfs")
