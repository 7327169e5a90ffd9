"""Whole models with the attention back end that was asked for; Triton's runs interpreted where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.core.errors import ConfigError
from tests import triton_interpreter
from tests.thorough import some_of
from tests.tiny_models import make_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30] * 19]
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def answers(folder: Path, backend: str) -> list[list[int]]:
    """With prompts in two chunks, so that some steps mix chunks and decodes."""
    with LLM(
        folder, device="cpu", dtype="float32", num_blocks=32, max_num_batched_tokens=16, attention_backend=backend
    ) as llm:
        assert llm.model_info.attention_backend == backend
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("family", some_of(["gpt_oss", "gemma2", "llama"]))
def test_triton_and_torch_say_the_same(family: str, tmp_path: Path) -> None:
    """Grouped heads, windows with a soft cap, and sinks."""
    pytest.importorskip("triton")
    triton_interpreter.mend()
    make_model(family, tmp_path)
    assert answers(tmp_path, "triton") == answers(tmp_path, "torch")


def test_what_cannot_run_here_is_refused_with_the_remedy(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    wanted = r"attention_backend='vllm-flash-attn': .*compute capability.*Remedy: install vllm .*'auto'"
    with pytest.raises(ConfigError, match=wanted):
        LLM(tmp_path, device="cpu", num_blocks=32, attention_backend="vllm-flash-attn")
    with pytest.raises(ConfigError, match=r"attention_backend='xformers' .*one of auto, vllm-flash-attn"):
        LLM(tmp_path, device="cpu", num_blocks=32, attention_backend="xformers")  # type: ignore[arg-type]
