"""What PEFT's own path leaves behind when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def hooks_taken_back(model: torch.nn.Module) -> Iterator[None]:
    """Take away the forward pre-hooks that an exception leaves in ``model``'s modules.

    For ``adapter_names=`` PEFT hooks each layer and takes the hooks away behind the call, but not when it raises
    (``LoraModel._enable_peft_forward_hooks``): calls without names would go through that call's adapters from then on.
    """
    before = {module: set(module._forward_pre_hooks) for module in model.modules() if module._forward_pre_hooks}
    try:
        yield
    except BaseException:
        for module in model.modules():
            for key in module._forward_pre_hooks.keys() - before.get(module, set()):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise
