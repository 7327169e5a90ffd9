"""Where FlashAttention with block tables is found: in an installed vLLM, on the kernels hub, in vllm_flash_attn.

Each route returns the function that attends and what this build of it takes. The functions differ in names and in how
they are told the length of each sequence; ``FlashAttention`` (attention_flash.py) goes by their parameters.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from peft_dist.kernels.attention_interface import BackendUnavailableError

_VLLM_PARENT = "peft_dist_vllm_flash_attn"
_HUB_KERNELS = (
    (3, "kernels-community/vllm-flash-attn3"),
    (3, "kernels-community/flash-attn3"),
    (2, "kernels-community/flash-attn2"),
)


class FlashLibrary(NamedTuple):
    """One build of FlashAttention.

    Attributes:
        version: 2 or 3.
        source: Where it comes from, for the log.
        function: Attends to packed queries over a paged cache.
        block_multiple: KV blocks must be a multiple of this many tokens.
        scheduler_metadata: Prepares, once a forward, what every layer's call would compute; None where that is not
            known to be safe to share.
    """

    version: int
    source: str
    function: Callable[..., Any]
    block_multiple: int
    scheduler_metadata: Callable[..., Any] | None = None


def find_library(capability: tuple[int, int] | None) -> FlashLibrary:
    """The first route that has something for this compute capability (None: no GPU).

    Raises:
        BackendUnavailableError: none has; the text says of each why.
    """
    if capability is None or capability < (8, 0):
        raise BackendUnavailableError(f"FlashAttention needs compute capability 8.0, this device has {capability}")
    refused = []
    for route in (from_vllm, from_hub, from_package):
        try:
            return route(capability)
        except BackendUnavailableError as error:
            refused.append(str(error))
    raise BackendUnavailableError("; ".join(refused))


def from_vllm(capability: tuple[int, int]) -> FlashLibrary:
    """FlashAttention 3, else 2, of an installed vLLM, whose own package is not imported: that takes many seconds."""
    spec = importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    interface = next(
        (p for f in folders if (p := Path(f, "vllm_flash_attn", "flash_attn_interface.py")).exists()), None
    )
    if interface is None:
        raise BackendUnavailableError("vllm is not installed, or has no vllm_flash_attn")
    try:
        module = _import_file(interface)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(f"vllm's FlashAttention does not load: {error}") from error
    reasons = []
    for number in (3, 2) if capability[0] == 9 else (2,):
        if getattr(module, f"FA{number}_AVAILABLE", False):
            metadata = getattr(module, "get_scheduler_metadata", None) if number == 3 else None
            return FlashLibrary(
                number, f"vllm {_version('vllm')}", module.flash_attn_varlen_func, 16 if number == 2 else 1, metadata
            )
        reasons.append(f"FlashAttention {number}: {getattr(module, f'FA{number}_UNAVAILABLE_REASON', 'not in it')}")
    raise BackendUnavailableError(f"vllm's build has none for compute capability {capability}: {', '.join(reasons)}")


def _import_file(interface: Path) -> ModuleType:
    """vLLM's interface under a parent of ours that only knows the folder: relative imports find the libraries."""
    name = f"{_VLLM_PARENT}.{interface.stem}"
    if name in sys.modules:
        return sys.modules[name]
    parent = ModuleSpec(_VLLM_PARENT, None, is_package=True)
    parent.submodule_search_locations = [str(interface.parent)]
    sys.modules[_VLLM_PARENT] = importlib.util.module_from_spec(parent)
    return importlib.import_module(name)


def from_hub(capability: tuple[int, int]) -> FlashLibrary:
    """FlashAttention through the ``kernels`` package, which downloads it on first use."""
    if importlib.util.find_spec("kernels") is None:
        raise BackendUnavailableError("the kernels package is not installed")
    from kernels import get_kernel  # type: ignore[import-not-found]

    # Newer releases want a version, older ones do not know the argument.
    pinned = {"version": 1} if "version" in inspect.signature(get_kernel).parameters else {}
    refused = []
    for number, repository in _HUB_KERNELS:
        if number == 3 and capability[0] != 9:
            continue
        try:
            module = get_kernel(repository, **pinned)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            refused.append(f"{repository}: {error}")
            continue
        function = _paged_function(module)
        if function is not None:
            return FlashLibrary(number, repository, function, 256 if number == 2 else 1)
        refused.append(f"{repository}: has no function for packed queries over a paged cache")
    raise BackendUnavailableError("; ".join(refused))


def from_package(capability: tuple[int, int]) -> FlashLibrary:
    """FlashAttention 2 of the PyPI package ``vllm_flash_attn``."""
    if importlib.util.find_spec("vllm_flash_attn") is None:
        raise BackendUnavailableError("vllm_flash_attn is not installed")
    try:
        module = importlib.import_module("vllm_flash_attn")
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(f"vllm_flash_attn does not load: {error}") from error
    function = _paged_function(module)
    if function is None:
        raise BackendUnavailableError("this vllm_flash_attn has no function for packed queries over a paged cache")
    return FlashLibrary(2, f"vllm_flash_attn {_version('vllm_flash_attn')}", function, 16)


def _paged_function(module: ModuleType) -> Callable[..., Any] | None:
    """What takes both packed queries and block tables: either of the two functions, by release."""
    for name, wanted in (
        ("flash_attn_varlen_func", {"block_table"}),
        ("flash_attn_with_kvcache", {"page_table", "cu_seqlens_q"}),
    ):
        function = getattr(module, name, None)
        if function is not None and wanted <= inspect.signature(function).parameters.keys():
            found: Callable[..., Any] = function
            return found
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
