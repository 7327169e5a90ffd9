"""A base with a quantised weight says so, and adapters of that weight run unmerged, whatever the policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_dist import LLM
from peft_dist.runner import replica
from tests.e2e.known import Known
from tests.e2e.test_exactness import make_adapters
from tests.e2e.test_policies import check
from tests.tiny_models import make_model

SCALE = 2.0**-8
PATH = "model.layers.0.self_attn.q_proj"


class Int8Linear(nn.Linear):
    """A linear layer that keeps its weight in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        # A power of two: what it stands for is exact in float32.
        self.weight = nn.Parameter(rounded(linear.weight).to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * SCALE, self.bias)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return (weight.detach() / SCALE).round().clamp(-127, 127)


@pytest.mark.parametrize("way", ["shadow", "host"])
@pytest.mark.parametrize("policy", ["merge", "credit"])
def test_its_adapters_run_unmerged(
    policy: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama", tmp_path / "base")
    adapters = make_adapters("llama", model, tmp_path)
    projection = model.get_submodule(PATH)
    assert isinstance(projection, nn.Linear)
    projection.weight.data.copy_(rounded(projection.weight) * SCALE)
    load = replica.load_model

    def quantised(*arguments):  # type: ignore[no-untyped-def]
        loaded = load(*arguments)
        loaded.set_submodule(PATH, Int8Linear(loaded.get_submodule(PATH)))
        return loaded

    monkeypatch.setattr(replica, "load_model", quantised)
    of = Known(tmp_path / "base", model, adapters)
    options = {"device": "cpu", "dtype": "float32", "num_blocks": 64, "max_num_seqs": 6}
    log = tmp_path / "decisions.jsonl"
    with LLM(tmp_path / "base", adapters, policy=policy, merge=way, decision_log=str(log), **options) as llm:
        check(llm, of)
        quantised_ones = {spec.content_hash: spec.name for spec in llm.adapters if PATH in spec.ranks}
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    ran = {content for step in steps for content in step["scheduled"]}
    assert quantised_ones and ran >= quantised_ones.keys()
    assert not quantised_ones.keys() & {step["merged_adapter"] for step in steps}
    for name in quantised_ones.values():
        assert f"adapter {name!r} cannot be merged: {PATH} cannot be merged: its weight is" in caplog.text
    assert "Parameter of torch.int8 (quantised?)" in caplog.text
