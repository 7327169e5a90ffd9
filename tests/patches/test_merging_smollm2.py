"""Exact switching on the demo's model and adapters (make test-slow)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.runner.adapter_modules import describe_modules
from peft_dist.runner.adapter_tensors import load_adapter
from peft_dist.runner.packing import pack_weights
from tests.patches import oracle
from tests.patches.merge_cases import WAYS, digest, random_tensors, run, wrap_all

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from demo_model import ensure_demo_model  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
NAMES = ["json", "sentiment", "sql", "style"]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = "Name three rivers of Europe, and say which is the longest of them."


@pytest.fixture(autouse=True)
def two_threads(one_thread: None) -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_demo_adapters_equal_peft(way: str, packed: bool) -> None:
    folder = ensure_demo_model()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]] * (len(NAMES) + 1))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(base, ROOT / "scripts/demo_adapters" / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        peft_model.load_adapter(ROOT / "scripts/demo_adapters" / name, adapter_name=name)
    peft_model.eval()
    names = [*NAMES, "__base__"]
    expected = {name: oracle.alone(peft_model, name, lambda: peft_model(ids[:1]).logits[0]) for name in names}

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = digest(model)
    pack_weights(model, packed)
    modules = describe_modules(model)
    loaded = [load_adapter(name, ROOT / "scripts/demo_adapters" / name, modules).weights for name in NAMES]
    parts: list[dict[str, LayerTensors]] = [{p: (w.A, w.B, w.scaling) for p, w in part.items()} for part in loaded]
    layers, pool = wrap_all(model, {path.rsplit(".", 1)[-1] for part in parts for path in part})
    for slot, part in enumerate(parts):
        pool.load(slot, {layers[path].lora_index: tensors for path, tensors in part.items()})
    merger = WAYS[way](model, layers)
    slots = [0, 1, 2, 3, -1]
    mixed = torch.stack([expected[name] for name in names])
    for merged in (0, 1, 2, 3, 1, None):
        if merged is None:
            merger.unmerge()
        else:
            merger.merge(parts[merged])
            alone = run(model, pool, merger, [merged], merged, ids[:1])
            oracle.assert_logits_close(alone[0], expected[NAMES[merged]])
        oracle.assert_logits_close(run(model, pool, merger, slots, merged, ids), mixed)
    assert digest(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_switches(way: str, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(ensure_demo_model(), dtype=dtype).eval()
    layers, _ = wrap_all(model, LINEARS)
    merger = WAYS[way](model, layers)
    adapters = [random_tensors(layers, 8, seed) for seed in range(8)]
    before = digest(model)
    rng = random.Random(0)
    for step in range(1000):
        chosen = rng.randrange(-1, len(adapters))
        if chosen < 0:
            merger.unmerge()
            assert step % 10 or digest(model) == before
        else:
            merger.merge(adapters[chosen])
    merger.unmerge()
    assert digest(model) == before
