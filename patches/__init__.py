"""The drop-in for PEFT: mixed adapter batches at full speed in an existing script.

model = peft_dist.patch(PeftModel.from_pretrained(...))
model.generate(**inputs, adapter_names=["sql", "json", "__base__"])
"""

from __future__ import annotations

from typing import TypeVar, overload

from peft import PeftModel

from peft_dist.patches.every_model import patch_every_model, unpatch_every_model
from peft_dist.patches.fused_model import Fused, fuse, unfuse
from peft_dist.patches.peft_model import is_patched, patch_model, unpatch_model
from peft_dist.patches.registry import UnsupportedVersionError

__all__ = ["Fused", "UnsupportedVersionError", "fuse", "is_patched", "patch", "unfuse", "unpatch"]

M = TypeVar("M", bound=PeftModel)


@overload
def patch(model: M) -> M: ...
@overload
def patch(model: None = None) -> None: ...
def patch(model: PeftModel | None = None) -> PeftModel | None:
    """Run calls with ``adapter_names`` as one selective batch.

    Args:
        model: The model to patch, in place; None patches every PeftModel made afterwards.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no PeftModel.
        UnsupportedVersionError: the installed transformers or peft was not tested; nothing has changed.
    """
    if model is None:
        patch_every_model()
        return None
    return patch_model(model)


@overload
def unpatch(model: M) -> M: ...
@overload
def unpatch(model: None = None) -> None: ...
def unpatch(model: PeftModel | None = None) -> PeftModel | None:
    """Undo ``patch``: every attribute is the identical object again.

    Args:
        model: The model to restore; None undoes ``patch()`` and restores the models that it patched.

    Returns:
        The model.

    Raises:
        TypeError: it is no PeftModel, as the base of one is none.
    """
    if model is None:
        unpatch_every_model()
        return None
    return unpatch_model(model)
