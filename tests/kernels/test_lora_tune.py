"""Tuning on a GPU: plans are measured, written and found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_dist.kernels import lora_plans
from peft_dist.kernels.lora_plans import GroupShape
from peft_dist.runner.tune import tune


@pytest.mark.gpu
def test_a_table_is_measured_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lora_plans.FOLDER_VARIABLE, str(tmp_path))
    sizes = [(1024, (512, 512))]
    path = tune(sizes, rank=8, max_loras=2, max_num_seqs=2, max_tokens=16, tile_rows=(16,))
    plans = lora_plans.read_table(path)
    assert list(plans) == [GroupShape(16, 1, *sizes[0]), GroupShape(16, 4, *sizes[0])]
    lora_plans.tables_of.cache_clear()
    lora_plans.plan_for.cache_clear()
    try:
        for shape, plan in plans.items():
            assert lora_plans.plan_for(shape, torch.cuda.get_device_name()) == plan
    finally:
        lora_plans.tables_of.cache_clear()
        lora_plans.plan_for.cache_clear()
