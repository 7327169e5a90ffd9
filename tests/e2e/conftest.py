"""Small models that many tests compare with PEFT: made once a process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from tests.e2e.known import Known


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Known]:
    """By family."""
    return cache(lambda family: Known.of_family(family, tmp_path_factory.mktemp(family)))
