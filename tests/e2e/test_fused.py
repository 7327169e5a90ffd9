"""PEFT's answers from models whose weights are joined and whose modules are fused, merged and unmerged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from peft_dist import LLM, SamplingParams
from peft_dist.core.config import EngineConfig
from peft_dist.core.outputs import RequestOutput
from peft_dist.forward_context import ForwardContext
from peft_dist.kernels import reference
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.patches import fuse
from peft_dist.patches.fused_model import fused_of
from peft_dist.runner import model_runner, packing, replica
from tests.e2e.known import Known
from tests.e2e.test_exactness import NAMES, NUM_TOKENS, PROMPTS
from tests.oracle import Recorder, assert_close_logits, assert_identical, common_prefix
from tests.tiny_models import FAMILIES

torch.set_num_threads(1)
FUSED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral", "gpt_oss")


def assert_pefts(outputs: Sequence[RequestOutput], names: Sequence[str | None], of: Known, recorder: Recorder) -> None:
    """Tokens, without a tie, and logits."""
    for output, prompt, name in zip(outputs, PROMPTS, names, strict=True):
        adapter = None if name == "__base__" else name
        answer = of.answer(prompt, adapter, NUM_TOKENS)
        assert assert_identical(output.outputs[0].token_ids, answer, of.oracle, prompt, adapter) == 0
        same = common_prefix(output.outputs[0].token_ids, answer.tokens)
        assert_close_logits(recorder.logits[output.request_id], answer, min(same + 1, NUM_TOKENS))


@pytest.mark.parametrize("merge", ["off", "shadow", pytest.param("host", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FUSED)
def test_tokens_and_logits_are_pefts(
    family: str, merge: str, known: Callable[[str], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined and fused right after loading, as on a GPU, but with the kernels' plain twins."""
    monkeypatch.setattr(replica, "prepare_layers", lambda model, config: fuse(model, "reference"))
    of = known(family)
    adapters = dict(of.adapters)
    if merge == "host":
        # Embeddings that the head shares cannot be merged in place.
        del adapters["all"]
    names = ["some" if name == "all" and merge == "host" else name for name in NAMES]
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    policy = "fcfs" if merge == "off" else "merge"
    with LLM(
        of.base, adapters, device="cpu", dtype="float32", num_blocks=64, max_num_seqs=6, merge=merge,
        policy=policy,
    ) as llm:  # fmt: skip
        served = llm._open.runner.model
        recorder = Recorder(llm)
        outputs = llm.generate(PROMPTS, greedy, names, use_tqdm=False)
        assert fused_of(served).modules["norms"] and (fused_of(served).joined or family == "phi3")
    assert_pefts(outputs, names, of, recorder)


class Beside(PartsBeside):
    """Takes all that has adapters, with the kernels' plain twins; knows the layers whose parts it left to others."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.groups: Counter[int] = Counter()

    def fits(self, x, weights, plan):  # type: ignore[no-untyped-def]
        return None not in weights

    def compute(self, x, weights, plan, multiply):  # type: ignore[no-untyped-def]
        self.groups[len(weights)] += 1
        parts = [x.new_zeros(*x.shape[:-1], w.B.shape[1]) for w in weights]
        for part, w in zip(parts, weights, strict=True):
            reference.add_lora_(part[0], x[0], w, plan)
        return multiply(), parts


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_parts_that_norms_gates_and_rotations_add_are_pefts(
    family: str, known: Callable[[str], Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a norm stands between a projection and the sum, or experts are mixed, parts are added at once."""
    monkeypatch.setattr(replica, "prepare_layers", lambda model, config: fuse(model, "reference"))
    beside, of = Beside(), known(family)
    monkeypatch.setattr(model_runner, "ForwardContext", partial(ForwardContext, parts_beside=beside))
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    options = {"num_blocks": 64, "max_num_seqs": 6, "merge": "off", "policy": "fcfs"}
    with LLM(of.base, of.adapters, device="cpu", dtype="float32", **options) as llm:
        # Until all are on the device a step may have "some" alone, which leaves layers out.
        llm.generate([[3]] * 3, greedy, ["all", "some", "rs"], use_tqdm=False)
        beside.groups.clear()
        recorder = Recorder(llm)
        outputs = llm.generate(PROMPTS, greedy, NAMES, use_tqdm=False)
    assert_pefts(outputs, NAMES, of, recorder)
    # q/k/v; gate and up; o, and down.
    layers = beside.groups[3]
    assert layers and beside.groups[2] == (0 if family == "mixtral" else layers)
    assert beside.groups[1] == {"gemma2": 0, "mixtral": layers}.get(family, 2 * layers)


def test_a_part_of_another_tensor_is_not_lost() -> None:
    context, output = ForwardContext(takes_part=True), torch.zeros(2)
    context.hand_part(output, torch.ones(2))
    with pytest.raises(RuntimeError, match="--no-fuse"):
        context.take_part(output.clone())
    assert context.take_part(output) is None and not context.takes_part


@pytest.mark.parametrize(("wanted", "device", "expected"), [(True, "cuda", 1), (False, "cuda", 0), (True, "cpu", 0)])
def test_models_are_fused_on_a_gpu_unless_told_otherwise(
    wanted: bool, device: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = FAMILIES["llama"](), []
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda model: torch.device(device)))
    monkeypatch.setattr(packing, "fuse", calls.append)
    packing.prepare_layers(model, EngineConfig(model="m", fuse=wanted, pack_weights=False))
    assert len(calls) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_takes_no_second_copy_of_the_weights() -> None:
    model = FAMILIES["llama"]().cuda()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fuse(model)
    group = model.model.layers[0].mlp.gate_proj._joint.weight.nbytes
    assert torch.cuda.memory_allocated() <= 1.01 * before and torch.cuda.max_memory_allocated() <= before + 2 * group
