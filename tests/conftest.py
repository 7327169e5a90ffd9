"""Shared fixtures. Real models come from the demo cache; small random ones from tests/tiny_models.py."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import httpx
import hypothesis
import torch

from tests.thorough import IS_THOROUGH

# No example is too slow on a machine that others use. The same ones at every run: what fails once fails again, and
# fails with the change that broke it. New ones are tried with PEFT_DIST_THOROUGH=1.
hypothesis.settings.register_profile(
    "repeated", deadline=None, derandomize=not IS_THOROUGH, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeated")

# Five seconds, which are meant for networks, are few for a server that shares two cores with other tests.
httpx._config.DEFAULT_TIMEOUT_CONFIG.read = 60.0

if not torch.cuda.is_available():
    # Triton reads it when kernels are decorated: they then run on CPU tensors, in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Have collections of garbage, one for each model that is closed, pass over what is imported."""
    gc.collect()
    gc.freeze()
