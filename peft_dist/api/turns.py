"""Methods that threads take turns in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


def in_turn(method: Method) -> Method:
    """The method of an object with a lock ``_turn``: for one thread at a time, another one waits until it returns."""

    @functools.wraps(method)
    def taken(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return method(self, *args, **kwargs)

    return cast(Method, taken)
