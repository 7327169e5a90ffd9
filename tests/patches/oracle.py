"""Small PEFT models with adapters that differ in rank and targets, and PEFT's own answers for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tests.tiny_models import FAMILIES, VOCAB_SIZE, random_adapter, target_modules

NAMES = ["wide", "narrow", "__base__", "late", "wide"]
PROMPT = 12


def write_adapters(family: str, folder: Path) -> dict[str, Path]:
    """Four adapters: every module, a few modules with rsLoRA, patterns and rank two in some, and only late layers."""
    targets = target_modules(family)
    model = FAMILIES[family]()
    options: dict[str, dict[str, Any]] = {
        "wide": {"r": 4, "targets": targets},
        "narrow": {"r": 2, "targets": targets[:3], "use_rslora": True},
        "late": {
            "r": 8,
            "targets": [name for name in targets if "embed" not in name and name not in ("wte", "lm_head")],
            "layers_to_transform": [1, 2],
            "rank_pattern": {targets[0]: 3},
            "alpha_pattern": {targets[-2]: 3},
        },
        "spare": {"r": 3, "targets": targets[1:]},
    }
    return {
        name: random_adapter(model, folder / family / name, seed=seed, **chosen)
        for seed, (name, chosen) in enumerate(options.items())
    }


def load(family: str, adapters: dict[str, Path], names: tuple[str, ...] = ("wide", "narrow", "late")) -> PeftModel:
    """The family's model with these adapters, in eval mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(FAMILIES[family](), adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(adapters[name], adapter_name=name)
    return model.eval()


def inputs(rows: int = len(NAMES), seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    """Random prompts; every other row is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (rows, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, rows, 2):
            mask[row, : int(torch.randint(1, PROMPT - 1, (), generator=generator))] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(model: PeftModel, name: str, call: Any) -> Any:
    """What an unpatched model answers with one adapter set, or with none."""
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return call()
        model.set_adapter(name)
        return call()


def assert_logits_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4 of the logits' scale (-inf, which processors write, must stand in the same places)."""
    assert actual.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(actual), finite)
    difference = (actual[finite] - expected[finite]).abs().max()
    assert difference <= 1e-4 * expected[finite].abs().max(), f"logits differ by {difference}"
