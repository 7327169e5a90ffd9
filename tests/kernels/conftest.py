from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests import triton_interpreter

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    triton_interpreter.mend()


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small cases on a busy machine: threads that wait for each other take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
