"""What PEFT's own path leaves behind when it fails."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

_HOOK = "_adapter_names_pre_forward_hook"


@contextlib.contextmanager
def hooks_taken_back(model: torch.nn.Module) -> Iterator[None]:
    """Take away PEFT's forward pre-hooks that an exception leaves in ``model``'s modules.

    For ``adapter_names=`` PEFT hooks each layer and takes the hooks away behind the call, but not when it raises
    (``LoraModel._enable_peft_forward_hooks``): calls without names would go through that call's adapters from then on.
    """
    try:
        yield
    except BaseException:
        for module in model.modules():
            for key in [key for key, hook in module._forward_pre_hooks.items() if _is_pefts(hook)]:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise


def _is_pefts(hook: object) -> bool:
    if not isinstance(hook, functools.partial):
        return False
    # Each kind of adapters has one of its own.
    return hook.func.__name__ == _HOOK and hook.func.__module__.startswith("peft.")
