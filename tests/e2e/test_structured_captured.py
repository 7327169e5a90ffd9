"""Structured outputs in captured steps, whose graphs have drawn greedy tokens before anybody looks at a grammar."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist import LLM, SamplingParams, StructuredOutput
from tests import triton_interpreter
from tests.e2e.test_step_graphs import use_graphs
from tests.structured_models import make_writing_model
from tests.tiny_models import random_adapter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in captures on a CPU")


def test_answers_match_and_others_are_as_without(tmp_path: Path) -> None:
    triton_interpreter.mend()
    model = make_writing_model(tmp_path / "base")
    adapters = {"a": random_adapter(model, tmp_path / "a", 4, 8.0)}
    with LLM(
        tmp_path / "base",
        adapters,
        device="cpu",
        dtype="float32",
        depth=1,
        num_blocks=64,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        attention_backend="triton",
        pack_weights=False,
        max_model_len=64,
    ) as llm:
        spec = StructuredOutput(regex="[a-f][0-9]")
        greedy = SamplingParams(temperature=0.0, max_tokens=3)
        drawn = SamplingParams(seed=3, max_tokens=3, structured=spec)
        # Alone among greedy ones, whose tokens nobody writes behind the graph.
        batches = [[SamplingParams(temperature=0.0, max_tokens=3, structured=spec), greedy], [drawn, greedy]]

        def ask() -> list[Any]:
            outputs = [llm.generate(["hello"] * 2, params, [None, "a"], use_tqdm=False) for params in batches]
            return [output.outputs[0] for batch in outputs for output in batch]

        plain = ask()
        seen = use_graphs(llm)
        captured = ask()
        assert seen["decodes"] and seen["pending"]
        llm._open.runner.graphs = None
        [alone] = llm.generate("hello", greedy, "a", use_tqdm=False)
    assert [each.token_ids for each in captured] == [each.token_ids for each in plain]
    assert captured[1].token_ids == alone.outputs[0].token_ids
    for each in (captured[0], captured[2]):
        assert re.fullmatch("[a-f][0-9]", each.text) and each.finish_reason == "stop"
