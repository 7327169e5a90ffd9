"""Serve many LoRA adapters on one base model: a PEFT extension with patched layers.

Names are imported on first use, so that ``import peft_dist`` needs neither torch nor any optional part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_dist.api.llm import LLM as LLM
    from peft_dist.core.outputs import CompletionOutput as CompletionOutput
    from peft_dist.core.outputs import RequestOutput as RequestOutput
    from peft_dist.core.sampling_params import SamplingParams as SamplingParams
    from peft_dist.core.structured_output import StructuredOutput as StructuredOutput
    from peft_dist.patches import patch as patch
    from peft_dist.patches import unpatch as unpatch

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "peft_dist.api.llm",
    "CompletionOutput": "peft_dist.core.outputs",
    "RequestOutput": "peft_dist.core.outputs",
    "SamplingParams": "peft_dist.core.sampling_params",
    "StructuredOutput": "peft_dist.core.structured_output",
    "patch": "peft_dist.patches",
    "unpatch": "peft_dist.patches",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'peft_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
