"""How large an adapter is against the base: never told too small, and the same however it was read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.messages import AdapterResult, decode_report, encode_report
from peft_dist.runner.adapter_modules import ModuleShape, describe_modules
from peft_dist.runner.adapter_tensors import inspect_adapter, load_adapter
from peft_dist.runner.merge_setup import as_in_the_base
from peft_dist.runner.merge_state import MergeState
from peft_dist.runner.merged_ratio import host_limit, ratio_to_weight, row_rms
from tests.runner.adapter_folder import CONFIG, MODEL, MODULES, edit, set_config
from tests.tiny_models import FAMILIES, random_adapter

INF = math.inf


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(rows: torch.Tensor, columns: torch.Tensor, scaling: float, rms: float) -> float:
    return float((scaling * rows.double() @ columns.double().T).norm(dim=1).max()) / rms


def test_it_is_the_largest_row_against_the_mean_row_of_the_weight() -> None:
    rows, columns, weight = normal(40, 6), normal(30, 6, seed=1), normal(40, 30, seed=2)
    for scaling in (3.0, -3.0):
        found = ratio_to_weight(rows.float(), columns.float(), scaling, row_rms(weight.float(), 40))
        expected = measured(rows, columns, 3.0, float(weight.norm()) / 40**0.5)
        assert found == pytest.approx(expected, rel=0.3) and found > 7
    one = torch.zeros(40, 6)
    one[7] = rows[7]
    assert ratio_to_weight(one, columns.float(), 9.0, 1.0) == pytest.approx(measured(one, columns, 9.0, 1.0), rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [1e-3, 1.0, 1e4, -1e30])
@pytest.mark.parametrize("alike", [False, True])
def test_it_is_never_told_too_small(dtype: torch.dtype, scaling: float, alike: bool) -> None:
    """Nor is what is small told to be large: of ranks that point the same way, and of those that do not."""
    rows = (normal(20, 1) if alike else normal(20, 8)).expand(20, 8).to(dtype)
    columns = (normal(50, 1, seed=1) if alike else normal(50, 8, seed=1)).expand(50, 8).to(dtype)
    expected = measured(rows, columns, abs(scaling), 5.0)
    found = ratio_to_weight(rows, columns, scaling, 5.0)
    assert expected * 0.999 <= found <= expected * (3.0 if expected < 7 else 1.5)


def test_ranks_whose_factors_lie_far_apart_count_by_what_they_compute() -> None:
    rows, columns = normal(20, 2).float(), normal(30, 2, seed=1).float()
    expected = measured(rows, columns, 50.0, 1.0)
    apart = torch.tensor([1e30, 1e-25])
    assert ratio_to_weight(rows * apart, columns / apart, 50.0, 1.0) == pytest.approx(expected, rel=0.3)
    hidden = ratio_to_weight(rows * torch.tensor([1e30, 1.0]), columns * torch.tensor([1e-20, 1.0]), 1.0, 1.0)
    assert hidden > 1e10


def test_what_cancels_counts_by_its_size() -> None:
    """The kernel rounds each rank's part by itself."""
    rows, columns = normal(20, 1).float(), normal(30, 1, seed=1).float()
    found = ratio_to_weight(torch.cat([rows, -rows], 1), columns.expand(30, 2), 1e6, 1.0)
    assert found >= measured(rows, columns, 1e6, 1.0)


def test_beyond_numbers_it_is_infinite() -> None:
    rows, columns = torch.ones(3, 2), torch.ones(4, 2)
    assert ratio_to_weight(rows, columns, 1.0, 0.0) == INF
    assert ratio_to_weight(rows * 3e38, columns * 3e38, 1e300, 1.0) == INF
    assert ratio_to_weight(rows, columns, 1.0, math.nan) == INF
    assert ratio_to_weight(rows, columns * 0, 1.0, 0.0) == 0.0
    assert ratio_to_weight(rows, columns, 0.0, 1.0) == 0.0


class Written(TorchDispatchMode):
    """Counts the elements that torch's operators give out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.elements += found.numel()
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_a_usual_adapter_it_is_told_without_copies_of_it(dtype: torch.dtype) -> None:
    """All adapters of a replica that merges wait for this, one after another: a pass over each matrix, in pieces."""
    rows, columns = normal(4096, 64).to(dtype) / 100, normal(64, 4096, seed=1).to(dtype).T / 100
    with Written() as written:
        found = ratio_to_weight(rows, columns, 2.0, 1.28)
    assert measured(rows, columns, 2.0, 1.28) <= found < 7
    assert written.elements < 1.25 * (rows.numel() + columns.numel())


def test_half_precision_leaves_room_for_less() -> None:
    assert host_limit(torch.bfloat16) == host_limit(torch.float16) == 7.0
    assert 50 < host_limit(torch.float32) < 200
    assert not math.nan <= host_limit(torch.float32) and not host_limit(torch.float32) >= INF


def with_norms(family: str) -> dict[str, ModuleShape]:
    model = FAMILIES[family]()
    return dict(as_in_the_base(describe_modules(model), MergeState(model, "shadow")))


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn", "c_fc")), ("llama", ("embed_tokens",))],
)
def test_of_an_adapter_it_is_that_of_the_module_where_it_is_most(
    family: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    model = FAMILIES[family]()
    folder = random_adapter(model, tmp_path / "a", 4, 400.0, targets)
    modules = with_norms(family)
    spec = inspect_adapter("a", folder, modules)
    expected = 0.0
    for path, w in load_adapter("a", folder, modules).weights.items():
        weight = model.get_submodule(path).weight.detach()
        if modules[path].kind == "linear":
            norms, whole = (w.B @ w.A).norm(dim=1), weight.norm(dim=1)
        elif modules[path].kind == "conv1d":
            norms, whole = (w.B @ w.A).norm(dim=1), weight.norm(dim=0)
        else:
            norms, whole = (w.B @ w.A).norm(dim=0), weight.norm(dim=1)
        expected = max(expected, w.scaling * float(norms.max() / whole.square().mean().sqrt()))
    assert expected * 0.999 <= spec.merged_ratio <= expected * 1.3


def test_it_is_told_however_the_file_is_read_and_of_nothing_that_is_not_merged(tmp_path: Path) -> None:
    folder = random_adapter(MODEL, tmp_path / "a", 4, 400.0)
    modules = with_norms("llama")
    spec = inspect_adapter("a", folder, modules)
    assert 7.0 < spec.merged_ratio < INF
    assert inspect_adapter("a", folder, MODULES).merged_ratio == 0.0
    only_v = {path: m if path.endswith("v_proj") else replace(m, row_rms=None) for path, m in modules.items()}
    assert 0.0 < inspect_adapter("a", folder, only_v).merged_ratio <= spec.merged_ratio
    # Of two types it is read whole.
    first = next(iter(sorted(spec.ranks)))
    key = f"base_model.model.{first}.lora_A.weight"
    edit(folder, lambda tensors: tensors.update({key: tensors[key].to(torch.bfloat16)}))
    assert inspect_adapter("a", folder, modules).merged_ratio == pytest.approx(spec.merged_ratio, rel=0.01)
    set_config(folder, lora_alpha=1e30)
    assert json.loads((folder / CONFIG).read_text())["lora_alpha"] == 1e30
    assert inspect_adapter("a", folder, modules).merged_ratio > 1e25


def test_it_travels() -> None:
    spec = AdapterSpec("a", "hash", "", {"m": 4}, 10, merged_ratio=INF)
    report = AdapterResult(call_id=1, spec=spec)
    assert decode_report(encode_report(report, 3)).message == report
