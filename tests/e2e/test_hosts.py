"""An adapter far larger than the base, where others may join merged batches: their answers stay PEFT's."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.engine.decisions import Decision
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.settings import PolicySettings
from tests.oracle import PeftOracle, Recorder, assert_close_logits, assert_identical, common_prefix
from tests.tiny_models import VOCAB_SIZE, make_model, random_adapter

torch.set_num_threads(1)
NUM_TOKENS = 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVERYTHING = (*PROJECTIONS, "lm_head", "embed_tokens")
NAMES = ["big", "big", "good", "big", None, "big", "big", "good", "big", "big"]
PROMPTS = [[3 + (i * k + k) % (VOCAB_SIZE - 3) for i in range(3 + k)] for k in range(1, len(NAMES) + 1)]
# Rows through the kernel are dear and switches are free, so that a batch around the majority's adapter always wins.
BY_ROW = CostPrior(
    step=10e-3, decode_sequence=1e-3, lora_step=0.0, lora_token=2e-3, adapter=0.0, merge=(0.0, 0.0), unmerge=(0.0, 0.0)
)
SETTINGS = PolicySettings(
    merged_minority=True, max_adapter_wait=1e9, credit_gap=1e9, expected_lead=math.inf, alpha=0.75, seated_alpha=0.75
)


def served(folder: Path, alpha: float, targets: tuple[str, ...], way: str) -> tuple[bool, bool]:
    """Check the answers of all but "big"; whether it was merged for itself, and whether with others beside it."""
    model = make_model("llama", folder / "base")
    adapters = {
        "big": random_adapter(model, folder / "big", 64, alpha, targets, seed=1),
        "good": random_adapter(model, folder / "good", 4, 8.0, EVERYTHING, seed=2),
    }
    oracle = PeftOracle(model, {"good": adapters["good"]})
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    decisions: list[Decision] = []
    with LLM(
        folder / "base", adapters, device="cpu", dtype="float32", num_blocks=64, max_num_seqs=8, merge=way,
        merged_minority=True,
    ) as llm:  # fmt: skip
        engine = llm._open.engine
        # Both are on the device, and neither in the weights, before anything is decided.
        llm.generate([[5], [5]], SamplingParams(max_tokens=1), ["big", "good"], use_tqdm=False)
        engine.executor.switch(None)
        engine.scheduler.policy = CreditPolicy(CostModel(BY_ROW, fixed=True), SETTINGS)
        engine.on_decision = decisions.append
        recorder = Recorder(llm)
        outputs = llm.generate(PROMPTS, greedy, NAMES, use_tqdm=False)
        [big] = [spec.content_hash for spec in engine.adapters.values() if spec.name == "big"]
    for output, prompt, name in zip(outputs, PROMPTS, NAMES, strict=True):
        if name == "big":
            continue
        tokens, answer = output.outputs[0].token_ids, oracle.answer(prompt, name, NUM_TOKENS)
        assert len(tokens) == NUM_TOKENS, f"{name}: {output.outputs[0].finish_reason}"
        assert_identical(tokens, answer, oracle, prompt, name)
        same = common_prefix(tokens, answer.tokens)
        assert_close_logits(recorder.logits[output.request_id], answer, min(same + 1, NUM_TOKENS))
    over_big = [decision.scheduled for decision in decisions if decision.merged_adapter == big]
    return any(len(adapters) == 1 for adapters in over_big), any(len(adapters) > 1 for adapters in over_big)


@pytest.mark.parametrize("way", ["shadow", "host"])
@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "lm_head", "embed_tokens")], ids=["inner", "outer"])
@pytest.mark.parametrize("alpha", [8e6, 1e30, -8e6])
def test_an_adapter_far_larger_than_the_base_harms_nobody_else(
    alpha: float, targets: tuple[str, ...], way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    was_merged, was_host = served(tmp_path, alpha, targets, way)
    assert was_merged and not was_host
    [line] = [record for record in caplog.records if "may not join" in record.message]
    assert line.levelno == logging.WARNING and "'big'" in line.message and "lora_alpha" in line.message


@pytest.mark.parametrize("alpha", [8.0, 8e3])
def test_others_join_one_that_leaves_them_their_digits(
    alpha: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, was_host = served(tmp_path, alpha, PROJECTIONS, "shadow")
    assert was_host
    assert "may not join" not in caplog.text
