"""Fused models answer as Hugging Face's code does, and become Hugging Face's again without a trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.types import AttentionMetadata
from peft_dist.patches import attention, fuse, fused_attention, fused_layer, unfuse
from peft_dist.patches.catalog import FUSED_MLP
from peft_dist.patches.fused_model import fused_of
from peft_dist.patches.fusion import is_fused
from peft_dist.patches.registry import Patch
from peft_dist.runner.kv_probe import probe_kv_shapes
from tests.patches.merge_cases import digest
from tests.patches.test_joined_linear import files
from tests.thorough import some_of
from tests.tiny_models import FAMILIES, NUM_LAYERS, VOCAB_SIZE

# Norms, MLPs, attention modules, layers.
EXPECTED = {
    "llama": (7, 3, 3, 3),
    "qwen2": (7, 3, 3, 3),
    "qwen3": (13, 3, 3, 3),
    "mistral": (7, 3, 3, 3),
    "gemma2": (13, 3, 3, 3),
    "gemma3": (19, 3, 3, 3),
    "phi3": (7, 0, 0, 0),
    "mixtral": (7, 0, 3, 3),
    "gpt_oss": (7, 0, 0, 0),
    "opt": (0, 0, 0, 0),
    "gpt2": (0, 0, 0, 0),
    "gpt_neox": (0, 0, 0, 0),
}
BLOCK = 4
LENGTHS = (9, 1, 14)


class Pass:
    """Prompts of ``LENGTHS`` packed, then one token of each, through paged attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        attention.register()
        model.set_attn_implementation(attention.ATTENTION_NAME)
        self.model = model
        self.width = -(-(max(LENGTHS) + 1) // BLOCK)
        shapes = probe_kv_shapes(model)
        self.kv = KVCachePool(shapes, len(LENGTHS) * self.width, BLOCK, model.dtype, model.device)
        self.tables = np.random.default_rng(0).permutation(len(LENGTHS) * self.width).astype(np.int32)
        self.ids = torch.randint(3, VOCAB_SIZE, (64,), generator=torch.Generator().manual_seed(5))

    def run(self, starts: list[int], lengths: list[int]) -> torch.Tensor:
        """Logits of the tokens ``starts[s] : starts[s] + lengths[s]`` of each sequence."""
        tables = self.tables.reshape(len(LENGTHS), self.width)
        positions = [np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]
        slots = np.concatenate([t[p // BLOCK] * BLOCK + p % BLOCK for t, p in zip(tables, positions, strict=True)])
        loc = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        context = np.add(starts, lengths).astype(np.int32)
        arrays = (loc, context, tables, slots.astype(np.int64))
        meta = AttentionMetadata(
            *arrays, *map(torch.from_numpy, arrays), max(lengths), int(context.max()), backend="torch"
        )
        position = torch.from_numpy(np.concatenate(positions))[None]
        ids = self.ids[position + torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))]
        with torch.no_grad(), ForwardContext(attention=meta, kv_caches=self.kv.caches) as current:
            logits = self.model(input_ids=ids, position_ids=position, use_cache=False).logits[0]
        assert not current.shared, "outputs that nobody took"
        return logits

    def all(self) -> torch.Tensor:
        prompts, steps = self.run([0] * 3, list(LENGTHS)), self.run(list(LENGTHS), [1] * 3)
        return torch.cat([prompts, steps])


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square."""
    return float((actual.double() - expected.double()).square().mean().sqrt())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often fused code ran."""
    counts = {"attention": 0, "sums": 0}

    def count(name: str, function: object) -> object:
        def call(*args: object) -> object:
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(fused_attention, "_attend", count("attention", fused_attention._attend))
    monkeypatch.setattr(fused_layer, "add_and_norm", count("sums", fused_layer.add_and_norm))
    return counts


def test_the_installed_forms_are_reviewed() -> None:
    assert fuse(FAMILIES["llama"]()).notes == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_original_code(family: str, counted: dict[str, int]) -> None:
    model = FAMILIES[family]()
    passes = Pass(model)
    expected = passes.all()
    report = fuse(model, "reference")
    assert tuple(report.modules.values()) == EXPECTED[family]
    actual = passes.all()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    _, _, modules, layers = EXPECTED[family]
    assert counted == {"attention": 2 * modules, "sums": 4 * layers}
    unfuse(model)
    assert torch.equal(passes.all(), expected)


# Not those with experts: one choice that rounding turns outweighs everything else.
@pytest.mark.parametrize("family", some_of(["llama", "qwen2", "gemma3", "mistral", "phi3", "gemma2", "qwen3"]))
def test_bfloat16_is_as_near_to_float32_as_the_original_code(family: str) -> None:
    """Over several random models: of one, either may be nearer by chance."""
    plain, fused = [], []
    for seed in range(5):
        model, exact = FAMILIES[family](), FAMILIES[family]()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0.0, 0.25, generator=generator)
        exact.load_state_dict(model.bfloat16().state_dict())
        expected, passes = Pass(exact).all(), Pass(model)
        plain.append(error(passes.all(), expected))
        fuse(model, "reference")
        fused.append(error(passes.all(), expected))
    assert np.square(fused).sum() ** 0.5 <= 1.05 * np.square(plain).sum() ** 0.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_with_the_kernels_themselves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    model = FAMILIES[family]()
    passes = Pass(model)
    expected = passes.run([0] * 3, [5, 1, 3])
    fuse(model, "triton")
    actual = passes.run([0] * 3, [5, 1, 3])
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def attributes(model: nn.Module) -> list[tuple[type, dict[str, object]]]:
    return [(type(module), dict(module.__dict__)) for module in model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_itself_again(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    before, bits, parameters = attributes(model), digest(model), list(model.parameters())
    names = [name for name, _ in model.named_modules()]
    model.save_pretrained(tmp_path / "before")
    first = fuse(model)
    again = fuse(model)
    assert first == again == fused_of(model)
    assert [name for name, _ in model.named_modules()] == names and digest(model) == bits
    model.save_pretrained(tmp_path / "fused")
    assert files(tmp_path / "fused") == files(tmp_path / "before")
    unfuse(model)
    unfuse(model)
    for (kind, old), (now, new) in zip(before, attributes(model), strict=True):
        assert now is kind and old.keys() == new.keys() and all(old[key] is new[key] for key in old)
    assert digest(model) == bits
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_the_original_code_runs_outside_of_a_pass_and_with_gradients(counted: dict[str, int]) -> None:
    ids = torch.arange(3, 12)[None]
    model, plain = FAMILIES["llama"](), FAMILIES["llama"]()
    fuse(model, "reference")
    assert torch.equal(model(ids).logits, plain(ids).logits)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, plain.generate(ids, max_new_tokens=5, do_sample=False))
    for one in (model, plain):
        one.train()
        one(ids, labels=ids).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    with ForwardContext():
        model(ids, labels=ids).loss.backward()
    assert counted == {"attention": 0, "sums": 0}


def test_without_paged_attention_all_but_attention_is_fused(counted: dict[str, int]) -> None:
    """A call of the drop-in: a padded batch, Hugging Face's attention."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = FAMILIES["llama"]()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        fuse(model, "reference")
        with ForwardContext():
            actual = model(ids, attention_mask=mask).logits
    assert (actual - expected)[mask.bool()].abs().max() <= 1e-5 * expected.abs().max()
    assert counted == {"attention": 0, "sums": 2 * NUM_LAYERS}


def test_copies_are_not_fused() -> None:
    model = FAMILIES["qwen3"]()
    fuse(model, "reference")
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert not any(map(is_fused, copied.modules())) and any(map(is_fused, model.modules()))
    assert [type(m) for m in copied.modules()] == [type(m) for m in FAMILIES["qwen3"]().modules()]
    ids = torch.arange(3, 12)[None]
    assert torch.equal(copied(ids).logits, model(ids).logits)


def test_other_code_under_a_known_name_is_left_alone() -> None:
    model = FAMILIES["llama"]()
    layer = model.model.layers[1]

    class LlamaRMSNorm(type(layer.input_layernorm)):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 2

    layer.input_layernorm.__class__ = LlamaRMSNorm
    layer.mlp.forward = lambda x: x
    layer.self_attn.q_proj.forward = lambda x: x
    report = fuse(model, "reference")
    assert tuple(report.modules.values()) == (6, 2, 3, 3) and report.joined == 5
    assert type(layer.input_layernorm) is LlamaRMSNorm and not is_fused(layer.mlp)


def test_hooks_see_every_module(counted: dict[str, int]) -> None:
    model = FAMILIES["qwen3"]()
    passes = Pass(model)
    modules = [m for n, m in model.named_modules() if n.endswith(("norm", "proj", "mlp", "self_attn"))]
    seen: list[nn.Module] = []
    for module in modules:
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    expected = passes.all()
    order, seen[:] = list(seen), []
    fuse(model, "reference")
    actual = passes.all()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert seen == order, "each once, in the order of the original code"


def test_unknown_code_of_the_library_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patch, "fingerprint", lambda patch: "another" if patch is FUSED_MLP else "x")
    model = FAMILIES["llama"]()
    report = fuse(model)
    assert set(report.modules.values()) == {0} and report.joined == 6 and len(report.notes) == 4
    assert "patches/fused_mlp.py does not know the code of the installed transformers" in str(report)


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    before = [type(module) for module in model.modules()]

    def fail(module: nn.Module) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("peft_dist.patches.fused_model.following_norms", fail)
    with pytest.raises(RuntimeError, match="no"):
        fuse(model)
    assert [type(module) for module in model.modules()] == before and not any(map(is_fused, model.modules()))
