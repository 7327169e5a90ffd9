"""Methods that threads take turns in."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from peft_dist.core.errors import PeftDistError

Method = TypeVar("Method", bound=Callable[..., Any])


class Turns:
    """Whose methods are run one at a time, whichever thread calls (``in_turn``)."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._whose: int | None = None


def in_turn(method: Method) -> Method:
    """The method of a ``Turns``, for one thread at a time: another one waits until it returns.

    Raises:
        PeftDistError: it is called from within another one, as by a handler of a signal.
    """

    @functools.wraps(method)
    def taken(self: Turns, /, *args: Any, **kwargs: Any) -> Any:
        own = threading.get_ident()
        if self._whose == own:
            raise PeftDistError(
                f"{method.__name__} was called within another call of the same object, which it would wait for: "
                "from a signal's handler set a flag, or raise, and call it behind that call"
            )
        with self._turn:
            self._whose = own
            try:
                return method(self, *args, **kwargs)
            finally:
                self._whose = None

    return cast(Method, taken)
