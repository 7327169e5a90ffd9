"""While an LLM generates, the garbage collector does not walk over the model; afterwards it does again."""

from __future__ import annotations

import gc
from pathlib import Path

from peft_dist import LLM, SamplingParams
from tests.tiny_models import make_model


def test_the_heap_is_frozen_while_steps_run(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    gc.unfreeze()
    frozen: list[int] = []
    with LLM(str(tmp_path), device="cpu", num_blocks=32) as llm:
        llm._open.engine.on_decision = lambda decision: frozen.append(gc.get_freeze_count())
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert len(frozen) == 3 and min(frozen) > 10_000
    assert gc.get_freeze_count() == 0
