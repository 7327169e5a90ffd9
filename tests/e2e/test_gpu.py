"""The same answers on a CUDA device, with a step in flight (make test-gpu)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from peft_dist import LLM, SamplingParams, StructuredOutput
from peft_dist.core.batch import Batch
from peft_dist.runner.executor import Submitted, TorchExecutor
from tests.e2e.test_exactness import NAMES, NUM_TOKENS, PROMPTS, make_adapters
from tests.oracle import PeftOracle, assert_identical
from tests.structured_models import make_writing_model
from tests.tiny_models import FAMILIES, make_model, random_adapter

# Steps are captured for each number of sequences, at each start.
SEATS = 8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_are_pefts(family: str, depth: int, tmp_path: Path) -> None:
    model = make_model(family, tmp_path / "base")
    adapters = make_adapters(family, model, tmp_path)
    oracle = PeftOracle(model, adapters)
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(
        tmp_path / "base",
        adapters,
        device="cuda",
        dtype="float32",
        depth=depth,
        num_blocks=64,
        max_num_seqs=SEATS,
        max_num_batched_tokens=24,
    ) as llm:
        assert llm.model_info.device.startswith("cuda") and llm.model_info.depth == depth
        outputs = llm.generate(PROMPTS, greedy, NAMES, use_tqdm=False)
    for output, prompt, name in zip(outputs, PROMPTS, NAMES, strict=True):
        adapter = None if name == "__base__" else name
        answer = oracle.answer(prompt, adapter, NUM_TOKENS)
        assert_identical(output.outputs[0].token_ids, answer, oracle, prompt, adapter)


def test_memory_is_measured_and_swapping_and_sampling_work(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    adapters = make_adapters("llama", model, tmp_path)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=30, ignore_eos=True, presence_penalty=0.3, logprobs=2)
    prompts, names = PROMPTS[:5], NAMES[:5]
    with LLM(
        tmp_path / "base", adapters, device="cuda", dtype="float32", gpu_memory_utilization=0.2, max_num_seqs=SEATS
    ) as llm:
        assert llm.model_info.depth == 1
        workspace = llm._open.runner.store.pool.workspace
        assert workspace.per_rank > 0, "KV blocks left nothing for adapters' rank intermediates"
        expected = llm.generate(prompts, params, names, use_tqdm=False)
        assert 0 < workspace.num_bytes <= workspace.bytes_with(256)
    with LLM(
        tmp_path / "base", adapters, device="cuda", dtype="float32", num_blocks=8, block_size=8, num_host_blocks=40,
        preemption="swap", max_model_len=64, max_num_seqs=SEATS,
    ) as llm:  # fmt: skip
        outputs = llm.generate(prompts, params, names, use_tqdm=False)
        assert llm._open.engine.stats().num_preemptions > 0
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.parametrize("way", ["shadow", "host"])
def test_switches_are_timed_on_the_device(way: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    adapters = make_adapters("llama", model, tmp_path)
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    options = {
        "device": "cuda",
        "dtype": "float32",
        "num_blocks": 64,
        "max_num_seqs": SEATS,
        "policy": "merge",
        "merge": way,
    }
    with LLM(tmp_path / "base", adapters, **options) as llm:
        llm.generate(PROMPTS, greedy, NAMES, use_tqdm=False)
        engine = llm._open.engine
        assert engine.num_switches > 1 and 0 < engine.switch_seconds < 60


@pytest.mark.parametrize("depth", [0, 1])
def test_structured_outputs_match_and_leave_others_alone(depth: int, tmp_path: Path) -> None:
    """Captured steps have drawn greedy tokens before anybody looks at a grammar."""
    model = make_writing_model(tmp_path / "base")
    adapters = {"a": random_adapter(model, tmp_path / "a", 4, 8.0)}
    spec = StructuredOutput(regex="[a-f][0-9]{1,9}[g-k]")
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    bound = [SamplingParams(temperature=0.0, structured=spec), SamplingParams(temperature=0.9, seed=3, structured=spec)]
    asked = [(params, name) for params in [*bound, greedy] for name in (None, "a")]
    params, names = [each for each, _ in asked], [name for _, name in asked]
    answers = []
    for eager in (False, True):
        with LLM(
            tmp_path / "base", adapters, device="cuda", dtype="float32", depth=depth, num_blocks=64, max_num_seqs=8,
            max_model_len=64, enforce_eager=eager,
        ) as llm:  # fmt: skip
            together = llm.generate(["hello"] * len(asked), params, names, use_tqdm=False)
            alone = [llm.generate("hello", greedy, name, use_tqdm=False)[0] for name in (None, "a")]
        assert [o.outputs[0].token_ids for o in together[-2:]] == [o.outputs[0].token_ids for o in alone]
        assert all(re.fullmatch(str(spec.regex), o.outputs[0].text) for o in together[:4])
        answers.append([o.outputs[0].token_ids for o in together])
    assert answers[0] == answers[1]


SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


@pytest.mark.parametrize("options", [{"temperature": 0.0}, SAMPLED, {**SAMPLED, "top_k": 20, "min_p": 0.01}])
@pytest.mark.parametrize("eager", [False, True])
def test_nobody_waits_for_the_device_while_a_decode_step_is_queued(
    options: dict[str, float], eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, replay, draws and their copy; that a step's tokens are waited for, by an event, is collecting."""
    model = make_model("llama", tmp_path / "base")
    adapters = {"a": random_adapter(model, tmp_path / "a", 4, 8.0)}
    params = SamplingParams(max_tokens=12, ignore_eos=True, **options)  # type: ignore[arg-type]
    asked = PROMPTS[:4], params, ["a", None, "a", None]
    submit, strict, replayed = TorchExecutor.submit, list[int](), list[int]()

    def watched(self: TorchExecutor, batch: Batch) -> Submitted:
        if any(len(sequence.token_ids) > 1 for sequence in batch.sequences):
            return submit(self, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            handle = submit(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        strict.append(len(batch.sequences))
        return handle

    with LLM(
        tmp_path / "base", adapters, device="cuda", dtype="bfloat16", num_blocks=64, max_num_seqs=SEATS,
        max_model_len=64, enforce_eager=eager,
    ) as llm:  # fmt: skip
        # The adapter is loaded, kernels are compiled and steps captured by then.
        llm.generate(*asked, use_tqdm=False)
        if (graphs := llm._open.runner.graphs) is not None:
            run = graphs.run
            monkeypatch.setattr(graphs, "run", lambda *args: (replayed.append(1), run(*args))[1])
        monkeypatch.setattr(TorchExecutor, "submit", watched)
        outputs = llm.generate(*asked, use_tqdm=False)
    assert len(strict) >= 10 and max(strict) == 4, strict
    assert eager or len(replayed) >= len(strict), "no step was a replay"
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12] * 4
