"""Exactly PEFT's answers, whatever else is in the batch: every family, every target module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from peft_dist import LLM, SamplingParams
from tests.oracle import Recorder, assert_close_logits, assert_identical, common_prefix
from tests.tiny_models import FAMILIES, VOCAB_SIZE, random_adapter, target_modules

if TYPE_CHECKING:
    from tests.e2e.known import Known

torch.set_num_threads(1)
NUM_TOKENS = 12
LENGTHS = (1, 5, 9, 17, 23, 5, 2, 31, 8, 13)
PROMPTS = [[3 + (i * k + k) % (VOCAB_SIZE - 3) for i in range(n)] for k, n in enumerate(LENGTHS, 1)]
NAMES = ["all", "some", None, "rs", "all", "rs", "some", None, "__base__", "all"]


def make_adapters(family: str, model: torch.nn.Module, folder: Path) -> dict[str, Path]:
    everything = target_modules(family)
    inner = [name for name in everything if name not in ("lm_head", "embed_out", "embed_tokens", "wte", "embed_in")]
    return {
        "all": random_adapter(model, folder / "all", 4, 8.0, everything, seed=1),
        "some": random_adapter(model, folder / "some", 7, 5.0, inner[:2], layers_to_transform=[0, 2], seed=2),
        "rs": random_adapter(
            model, folder / "rs", 3, 6.0, inner, use_rslora=True, rank_pattern={inner[0]: 9},
            alpha_pattern={inner[-1]: 2.0},
            seed=3, dtype=torch.bfloat16,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [7, 512])
def test_tokens_and_logits_are_pefts(family: str, chunk: int, known: Callable[[str], Known]) -> None:
    of = known(family)
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(
        of.base,
        of.adapters,
        device="cpu",
        dtype="float32",
        num_blocks=64,
        max_num_batched_tokens=chunk,
        max_num_seqs=6,
    ) as llm:
        recorder = Recorder(llm)
        outputs = llm.generate(PROMPTS, greedy, NAMES, use_tqdm=False)
    ties = 0
    for output, prompt, name in zip(outputs, PROMPTS, NAMES, strict=True):
        adapter = None if name == "__base__" else name
        answer = of.answer(prompt, adapter, NUM_TOKENS)
        ties += assert_identical(output.outputs[0].token_ids, answer, of.oracle, prompt, adapter)
        same = common_prefix(output.outputs[0].token_ids, answer.tokens)
        assert_close_logits(recorder.logits[output.request_id], answer, min(same + 1, NUM_TOKENS))
    assert ties == 0


def test_adapters_change_the_answer(known: Callable[[str], Known]) -> None:
    """The comparison above means nothing unless every adapter says something of its own."""
    of = known("llama")
    answers = {tuple(of.answer(PROMPTS[3], name, NUM_TOKENS).tokens) for name in ("all", "some", "rs", None)}
    assert len(answers) == 4
