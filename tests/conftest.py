"""Shared fixtures. Real models come from the demo cache; small random ones from tests/tiny_models.py."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if not torch.cuda.is_available():
    # Read when a kernel is defined: without a GPU, kernels run in Triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
