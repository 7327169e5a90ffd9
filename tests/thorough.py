"""Tests that try a few cases in ``make test``, and many in ``make test-slow``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import settings

Test = TypeVar("Test", bound=Callable[..., Any])
IS_THOROUGH = bool(os.environ.get("PEFT_DIST_THOROUGH"))


def examples(few: int, many: int, **options: Any) -> Callable[[Test], Test]:
    """Hypothesis's settings for a test whose examples cost a lot. ``options``: More of them."""
    chosen = settings(max_examples=many if IS_THOROUGH else few, deadline=None, **options)
    return lambda test: pytest.mark.thorough(chosen(test))


def some_of(values: Sequence[Any], every: int = 2) -> list[Any]:
    """For ``parametrize``: the first of so many in ``make test``, the others in ``make test-slow`` (and on a GPU)."""
    return [value if i % every == 0 else pytest.param(value, marks=pytest.mark.slow) for i, value in enumerate(values)]
