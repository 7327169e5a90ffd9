"""Stand-ins and calls for tests of captured decode passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import peft_dist
from peft_dist.kernels.capture import Capture
from peft_dist.patches.decode_graphs import DecodeGraphs
from tests.patches import oracle
from tests.tiny_models import FAMILIES

NEW = 8


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """Captures on a CPU: runs the function again, on what lies in its buffers then."""
    run()
    return run


def addresses(model: PeftModel) -> list[int]:
    """Of all tensors outside of its buffers that a captured pass of a patched model goes by."""
    state = model.__dict__["_peft_dist"]
    tensors = [tensor for cache in state.graphs.memory.caches.values() for tensor in cache]
    for held in state.weights._pool.addressed_weights:
        tensors += [t for t in (held.A, held.B, held.pages_t, held.rank_t, held.scaling_t) if t is not None]
    base = model.get_base_model()
    tensors += [p for name, p in base.named_parameters() if "lora_" not in name] + list(base.buffers())
    return [tensor.data_ptr() for tensor in tensors]


class Recorder:
    """Counts what another capture does, and checks that nothing has moved when it is replayed."""

    def __init__(self, model: PeftModel, capture: Capture = run_again) -> None:
        self.model = model
        self.capture = capture
        self.captured = 0
        self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        captured, before = self.capture(run), addresses(self.model)
        self.captured += 1

        def replay() -> None:
            assert addresses(self.model) == before
            self.replayed += 1
            captured()

        return replay


def patched(model: PeftModel, capture: Capture = run_again) -> tuple[PeftModel, Recorder]:
    """A patched model whose decode passes are captured by the recorder."""
    recorder = Recorder(model, capture)
    peft_dist.patch(model).__dict__["_peft_dist"].graphs = DecodeGraphs(lambda device: recorder)
    return model, recorder


def graphs_of(model: PeftModel) -> DecodeGraphs:
    """The captured passes of a patched model."""
    graphs: DecodeGraphs = model.__dict__["_peft_dist"].graphs
    return graphs


def call(model: PeftModel, names: list[str] = oracle.NAMES, **options: Any) -> Any:
    """``generate`` from a fixed seed, with logits; ``NEW`` greedy tokens unless asked otherwise."""
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    torch.manual_seed(7)
    inputs = given.pop("inputs", None) or oracle.inputs(len(names))
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return model.generate(**inputs, adapter_names=names, return_dict_in_generate=True, output_logits=True, **given)


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """The same tokens, and logits that are close."""
    assert torch.equal(actual.sequences, expected.sequences)
    ours, theirs = torch.stack(actual.logits), torch.stack(expected.logits)
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def linear_adapters(*ranks: int, device: str = "cpu") -> PeftModel:
    """A Llama of one layer with adapters a0, a1 and so on of these ranks on every linear, and on no embedding."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    configs = [
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        for rank in ranks
    ]
    base = FAMILIES["llama"]()
    base.model.layers = base.model.layers[:1]
    base.config.num_hidden_layers = 1
    model = get_peft_model(base, configs[0], adapter_name="a0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{number}", config)
    return model.eval().to(device)
