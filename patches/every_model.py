"""Patch every PeftModel that is made from now on."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from peft import PeftModel

from peft_dist.patches.catalog import PATCHES
from peft_dist.patches.peft_model import is_patched, patch_model, unpatch_model
from peft_dist.patches.registry import check_versions


class _EveryModel:
    """The replaced constructor and the models that it patched, for as long as the replacement stands."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._original: Callable[..., None] | None = None
        self._models: weakref.WeakSet[PeftModel] = weakref.WeakSet()

    def install(self) -> None:
        with self._lock:
            if self._original is not None:
                return
            check_versions(PATCHES)
            original = PeftModel.__init__
            models: weakref.WeakSet[PeftModel] = weakref.WeakSet()

            @functools.wraps(original)
            def construct(model: PeftModel, *args: Any, **kwargs: Any) -> None:
                original(model, *args, **kwargs)
                if not is_patched(model):
                    models.add(patch_model(model))

            PeftModel.__init__ = construct  # type: ignore[method-assign]
            self._original, self._models = original, models

    def remove(self) -> None:
        with self._lock:
            if self._original is None:
                return
            PeftModel.__init__ = self._original  # type: ignore[method-assign]
            self._original, models = None, self._models
        for model in list(models):
            unpatch_model(model)


_every_model = _EveryModel()


def patch_every_model() -> None:
    """Patch each PeftModel as it is made. Idempotent."""
    _every_model.install()


def unpatch_every_model() -> None:
    """Undo ``patch_every_model``, for the models it patched too. Does nothing when it is not in force."""
    _every_model.remove()
