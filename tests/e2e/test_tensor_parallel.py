"""Two processes with half of the weights each: PEFT's tokens, whatever the model, the mode and the traffic."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.core.errors import ConfigError
from tests.e2e.test_exactness import NAMES, NUM_TOKENS, PROMPTS, make_adapters
from tests.oracle import PeftOracle, assert_identical
from tests.patches.test_sharding import llama
from tests.ranks import Case, Found, run_cases
from tests.tiny_models import make_model

torch.set_num_threads(1)
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
ADAPTERS = [None if name == "__base__" else name for name in NAMES]
# Room for two adapters of three, so that they come and go between the steps of others.
OPTIONS = {"device": "cpu", "num_blocks": 64, "max_num_batched_tokens": 40, "max_num_seqs": 6, "max_loras": 2}
SPLIT = {**OPTIONS, "tensor_parallel_size": 2}
ROUND = list(zip(PROMPTS, ADAPTERS, strict=True))
# Again, so that prefixes are found in the cache.
ROUNDS = [ROUND, ROUND[::-1]]


Family = tuple[str, int | None, dict[str, object]]
"""With a lot for ``AnyMode``, or its own policy, and more options."""


def cases_of(families: list[Family], folder: Path) -> tuple[list[Case], list[PeftOracle]]:
    cases, oracles = [], []
    for number, (family, lot, options) in enumerate(families):
        own = folder / str(number)
        model = make_model(family, own / "base")
        adapters = make_adapters(family, model, own)
        oracles.append(PeftOracle(model, adapters))
        paths = {name: str(path) for name, path in adapters.items()}
        cases.append(Case(str(own / "base"), paths, ROUNDS, GREEDY, {**SPLIT, **options}, lot))
    return cases, oracles


def check_families(cases: list[Case], oracles: list[PeftOracle], lead: list[Found], follow: list[Found]) -> None:
    """What ranks saw beside PEFT."""
    for oracle, case, first, second in zip(oracles, cases, lead, follow, strict=True):
        for requests, answers in zip(case.rounds, first.tokens, strict=True):
            for (prompt, adapter), tokens in zip(requests, answers, strict=True):
                assert_identical(tokens, oracle.answer(prompt, adapter, NUM_TOKENS), oracle, prompt, adapter)
        assert first.slots and first.slots == second.slots and first.merged == second.merged
        assert case.lot is None or first.num_switches > 3


def run_families(families: list[Family], folder: Path) -> None:
    cases, oracles = cases_of(families, folder)
    check_families(cases, oracles, *run_cases(cases, folder))


def check_halves(first: Found, second: Found) -> None:
    """Of the Llama with 4 heads of 8, 2 of keys, 48 features in the MLP and 96 tokens."""
    assert first.shapes == second.shapes
    layer = "model.layers.0."
    inside = {name.removeprefix(layer): shape for name, shape in first.shapes.items() if name.startswith(layer)}
    assert inside == {
        "self_attn.q_proj.weight": [16, 32],
        "self_attn.k_proj.weight": [8, 32],
        "self_attn.v_proj.weight": [8, 32],
        "self_attn.o_proj.weight": [32, 16],
        "mlp.gate_proj.weight": [24, 32],
        "mlp.up_proj.weight": [24, 32],
        "mlp.down_proj.weight": [32, 24],
        "input_layernorm.weight": [32],
        "post_attention_layernorm.weight": [32],
    }
    assert first.shapes["model.embed_tokens.weight"] == first.shapes["lm_head.weight"] == [48, 32]
    assert first.kv_shape == second.kv_shape == [64, 16, 1, 8]


class Run(NamedTuple):
    """One launch for the tests below; its ranks need longer to start than for all cases."""

    families: tuple[list[Case], list[PeftOracle]]
    drawing: Case
    lead: list[Found]
    follow: list[Found]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ranks")
    families = cases_of([("llama", None, {"policy": "fcfs"}), ("gemma2", 1, {"merge": "shadow", "depth": 1})], folder)
    drawing = drawing_case(folder / "drawing")
    return Run(families, drawing, *run_cases([*families[0], drawing], folder))


def test_merged_and_unmerged_in_both_ways(ran: Run) -> None:
    check_families(*ran.families, ran.lead[:2], ran.follow[:2])
    check_halves(ran.lead[0], ran.follow[0])


@pytest.mark.slow
def test_every_family_that_can_be_split(tmp_path: Path) -> None:
    run_families(
        [
            ("llama", 3, {"merge": "host"}),
            ("qwen2", 1, {"merge": "host", "depth": 1}),
            ("qwen3", 2, {"merge": "shadow", "num_blocks": 10, "num_host_blocks": 20, "preemption": "swap"}),
            ("mistral", None, {"policy": "credit", "merged_minority": True}),
            ("gemma3", 4, {"merge": "shadow", "pack_weights": False}),
        ],
        tmp_path,
    )


def drawing_case(folder: Path) -> Case:
    """With biases, a number of tokens that does not divide, and a key head that both ranks keep."""
    model = llama(attention_bias=True, mlp_bias=True, num_key_value_heads=1, vocab_size=97)
    model.save_pretrained(folder / "base")
    paths = {name: str(path) for name, path in make_adapters("llama", model, folder).items()}
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 11, "max_tokens": 20, "ignore_eos": True}
    sampling |= {"presence_penalty": 0.7, "logprobs": 2, "prompt_logprobs": 1}
    return Case(str(folder / "base"), paths, [ROUND], sampling, SPLIT)


def test_draws_are_those_of_one_process(ran: Run) -> None:
    case, split = ran.drawing, ran.lead[-1]
    with LLM(case.model, case.adapters, **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(**case.sampling), NAMES, use_tqdm=False)
    assert split.tokens == [[output.outputs[0].token_ids for output in outputs]]
    assert len({tuple(tokens) for tokens in split.tokens[0]}) == len(PROMPTS)
    assert split.kv_shape == [64, 16, 1, 8]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "tensor_parallel_size=2 takes as many processes, and 1 of them run here.*peft-dist serve"),
        ({"exec_type": "vllm"}, "exec_type='vllm' keeps whole merged ones: use 'peft' or 'dlora'"),
        ({"device": "cuda:1"}, "device='cuda:1' names one: use device='cuda'"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(options: dict[str, str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        LLM(tmp_path, tensor_parallel_size=2, **{"device": "cpu", **options})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_two_gpus_give_pefts_tokens(tmp_path: Path) -> None:
    cuda = {"device": "cuda", "dtype": "float32", "max_num_batched_tokens": 96}
    run_families(
        [
            ("llama", None, {**cuda, "policy": "fcfs", "enforce_eager": True}),
            ("llama", None, {**cuda, "policy": "fcfs"}),
            ("gemma2", 1, {**cuda, "merge": "shadow"}),
            ("qwen2", 2, {**cuda, "merge": "host", "fuse": False}),
        ],
        tmp_path,
    )
