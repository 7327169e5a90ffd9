"""Which attention back end runs: one is chosen at the start, and layers it does not take go to the next."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch

from peft_dist.kernels.attention_cpu import CAttention
from peft_dist.kernels.attention_interface import AttentionBackend, AttentionNeeds, BackendUnavailableError
from peft_dist.kernels.attention_torch import TorchAttention

logger = logging.getLogger(__name__)

ORDER = {"cuda": ("vllm-flash-attn", "flashinfer", "triton", "torch"), "cpu": ("c", "torch")}
"""Best first, by type of device."""
NAMES = ("vllm-flash-attn", "flashinfer", "triton", "c", "torch")
_FALLBACK = {"cuda": ("triton", "torch")}
_REMEDY = {
    "vllm-flash-attn": "install vllm or the kernels package (extras [vllm], [flash]) on a GPU they know",
    "flashinfer": "install flashinfer-python (extra [flashinfer])",
    "triton": "install triton and use a CUDA device",
    "c": "use a CPU and install gcc, or name a compiler in PEFT_DIST_CC",
}


def choose(
    device: torch.device | str,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    block_size: int,
    wanted: str = "auto",
    compile_kernels: bool = True,
    captured: bool = False,
) -> str:
    """Name of the back end for a model, loaded and ready: what goes into ``AttentionMetadata.backend``. Logs it.

    Args:
        device, dtype: Where the model runs, and the type of its activations and its KV cache.
        shapes: (num_kv_heads, head_dim) of each layer. One layer that a back end takes is enough: the others fall
            back to the next one, layer by layer.
        block_size: Tokens of one KV block.
        wanted: "auto", or one of ``NAMES``.
        compile_kernels: Allow building the C kernels.
        captured: Steps are to be captured as CUDA graphs: "auto" takes what graphs cannot hold only where nothing else
            runs, because steps that Python launches cost more than any attention saves.

    Raises:
        BackendUnavailableError: ``wanted`` cannot run here.
    """
    device = torch.device(device)
    layers = [
        AttentionNeeds(device, dtype, dtype, heads, heads, dim, dim, block_size) for heads, dim in dict.fromkeys(shapes)
    ]
    names = order(device) if wanted == "auto" else (wanted,)
    refused: list[str] = []
    behind: list[AttentionBackend] = []
    for name in names:
        found = _found(name, device, layers, compile_kernels)
        if isinstance(found, str):
            refused.append(f"{name}: {found}")
        elif captured and wanted == "auto" and not found.graph_capturable:
            behind.append(found)
        else:
            refused += [f"{other.name}: CUDA graphs cannot hold it" for other in behind]
            return _chosen(found, device, dtype, refused)
    if behind:
        return _chosen(behind[0], device, dtype, refused)
    remedy = _REMEDY.get(wanted, "use 'auto'")
    raise BackendUnavailableError(
        f"attention back end {wanted!r} cannot run on {device} in {dtype}: {refused[-1].split(': ', 1)[1]}. "
        f"Remedy: {remedy}, or leave the choice to 'auto'"
    )


def _found(
    name: str, device: torch.device, layers: Sequence[AttentionNeeds], compile_kernels: bool
) -> AttentionBackend | str:
    """A back end that takes one of these layers at least, or why it does not."""
    if name == "c" and not compile_kernels:
        return "building them is switched off (compile_kernels=False)"
    found = load(name, device)
    if isinstance(found, str):
        return found
    reasons = [found.supports(needs) for needs in layers]
    return found if not reasons or None in reasons else str(reasons[0])


def _chosen(found: AttentionBackend, device: torch.device, dtype: torch.dtype, refused: list[str]) -> str:
    if refused:
        logger.info("attention back ends that were passed over: %s", "; ".join(refused))
    logger.info("attention for %s on %s: %s", dtype, device, found.description)
    return found.name


def order(device: torch.device) -> tuple[str, ...]:
    """Names of what can run on this type of device, best first."""
    return ORDER.get(device.type, ("torch",))


@lru_cache(maxsize=4096)
def resolve(name: str | None, needs: AttentionNeeds) -> AttentionBackend:
    """The back end ``name`` (the best one when None) where it takes such a layer, else the next that does."""
    names = order(needs.device) if name is None else (name, *_FALLBACK.get(needs.device.type, ("torch",)))
    refused: list[str] = []
    for candidate in names:
        found = load(candidate, needs.device)
        reason = found if isinstance(found, str) else found.supports(needs)
        if reason is None and not isinstance(found, str):
            if refused and name is not None:
                _log_fallback(name, refused[0], candidate)
            return found
        refused.append(str(reason))
    raise AssertionError("torch takes everything")


@lru_cache(maxsize=256)
def _log_fallback(name: str, reason: str, used: str) -> None:
    """Once for each combination."""
    logger.warning("attention back end %s does not take some layers (%s): %s runs them", name, reason, used)


def load(name: str, device: torch.device) -> AttentionBackend | str:
    """A back end for this device, or why there is none. Each is looked for once a process."""
    return _load(name, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


@lru_cache(maxsize=64)
def _load(name: str, capability: tuple[int, int] | None) -> AttentionBackend | str:
    if name == "torch":
        return TorchAttention()
    if name == "c":
        return CAttention()
    try:
        if name == "vllm-flash-attn":
            from peft_dist.kernels.attention_flash import FlashAttention

            return FlashAttention.load(capability)
        if name == "flashinfer":
            from peft_dist.kernels.attention_flashinfer import FlashInferAttention

            return FlashInferAttention.load(capability)
        if name == "triton":
            from peft_dist.kernels.attention_triton import TritonAttention

            return TritonAttention()
    except (ImportError, BackendUnavailableError) as error:
        return str(error)
    raise ValueError(f"unknown attention back end {name!r}: there are {', '.join(NAMES)}")


def forget() -> None:
    """Look for every back end anew."""
    for cached in (resolve, _load, _log_fallback):
        cached.cache_clear()
