"""PeftModel with ``adapter_names`` as one selective batch: a subclass, put on the instance."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any, cast

from peft import PeftModel

from peft_dist.patches import attention
from peft_dist.patches.catalog import PATCHES
from peft_dist.patches.drop_in import DropIn
from peft_dist.patches.registry import check_versions

_STATE = "_peft_dist"


def is_patched(model: PeftModel) -> bool:
    """Whether ``patch_model`` was applied to this instance."""
    return hasattr(type(model), "peft_dist_original")


def patch_model(model: PeftModel) -> PeftModel:
    """Patch one PeftModel in place and return it. Idempotent; on an error nothing has changed.

    Raises:
        TypeError: ``model`` is no PeftModel.
        UnsupportedVersionError: an installed library's version was not tested.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"patch() takes a peft.PeftModel, not a {type(model).__name__}: load adapters with "
            "PeftModel.from_pretrained or make one with peft.get_peft_model"
        )
    if is_patched(model):
        return model
    check_versions(PATCHES)
    attention.register()
    state = DropIn()
    with ExitStack() as undo:
        undo.callback(state.restore, model)
        state.rescan(model)
        model.__dict__[_STATE] = state
        undo.callback(model.__dict__.pop, _STATE)
        model.__class__ = patched_class(type(model))
        undo.pop_all()
    return model


def unpatch_model(model: PeftModel) -> PeftModel:
    """Make a patched model exactly what it was, and return it. Does nothing to a PeftModel that is not patched.

    Raises:
        TypeError: it is no PeftModel.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"unpatch() takes the PeftModel that was patched, not a {type(model).__name__}")
    if is_patched(model):
        state: DropIn = model.__dict__.pop(_STATE)
        model.__class__ = cast(Any, type(model)).peft_dist_original
        state.restore(model)
    return model


@functools.cache
def patched_class(original: type[PeftModel]) -> type[PeftModel]:
    """The subclass of a PeftModel class whose ``forward`` and ``generate`` know selective batches."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, super(patched, self).forward, args, kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(self, super(patched, self).generate, args, kwargs)

    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:
        return _rebuild, (original,), self.__dict__

    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce_ex__": __reduce_ex__,
        "peft_dist_original": original,
        "forward": functools.wraps(original.forward)(forward),
        "generate": functools.wraps(original.generate)(generate),
    }
    patched = type(original)(original.__name__, (original,), namespace)
    return patched


def _call(model: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = kwargs.pop("adapter_names", None)
    if names is None:
        return original(*args, **kwargs)
    state: DropIn = model.__dict__[_STATE]
    return state.call(model, original, names, args, kwargs)


def _rebuild(original: type[PeftModel]) -> PeftModel:
    """An empty patched instance, for copies and pickles: a dynamic class cannot be named in them."""
    patched = patched_class(original)
    model: PeftModel = patched.__new__(patched)
    return model
