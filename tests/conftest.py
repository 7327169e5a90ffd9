"""Shared fixtures. Real models come from the demo cache; small random ones from tests/tiny_models.py."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    # Triton reads it when kernels are decorated: they then run on CPU tensors, in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Have collections of garbage, one for each model that is closed, pass over what is imported."""
    gc.collect()
    gc.freeze()
