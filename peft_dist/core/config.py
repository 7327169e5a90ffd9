"""Configuration, built once at the entry point and never changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft_dist.core.errors import ConfigError

Preemption = Literal["auto", "recompute", "swap"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one replica.

    Attributes:
        model: Folder or hub id of the base model.
        served_model_name: What users call the base; the last part of ``model`` when None.
        revision: Hub revision of the base model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's on a GPU, float32 on CPU), "float32", "bfloat16" or "float16".
        max_model_len: Longest prompt plus output in tokens; the model's own limit when None.
        block_size: Tokens in one KV block.
        num_blocks: KV blocks on the device; sized from memory when None.
        num_host_blocks: KV blocks in host memory for preemption by swap.
        gpu_memory_utilization: Share of device memory this replica may use.
        kv_cache_bytes: KV bytes on a CPU when ``num_blocks`` is None.
        max_num_seqs: Most sequences in one step.
        max_num_batched_tokens: Most tokens in one step.
        enable_prefix_caching: Reuse the KV of shared prompt prefixes (per adapter content).
        preemption: What to do with a sequence when blocks run out: "recompute" its KV later, "swap" it to
            host memory, or "auto" (swap while the host has room).
        depth: Model steps in flight while the next one is scheduled; None is 0 on CPU, 1 on a GPU.
        max_loras: Adapters resident on the device at once.
        num_threads: CPU threads of the model; torch's default when None.
        pack_weights: Keep a copy of the weights in the CPU library's packed layout (faster, twice the
            memory); None packs on CPU when the copy fits in half of the free memory.
        compile_kernels: Build the C kernels on first use on a CPU (needs gcc); off falls back to torch.
        seed: Seeds the seeds of requests that bring none; None draws from the system.
        trust_remote_code: Let the base model's repository run code. No adapter can set it.
    """

    model: str
    served_model_name: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    num_host_blocks: int = 0
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int = 2 << 30
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    preemption: Preemption = "auto"
    depth: int | None = None
    max_loras: int = 64
    num_threads: int | None = None
    pack_weights: bool | None = None
    compile_kernels: bool = True
    seed: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_loras"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small: give at least 1")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]")
        if self.preemption not in ("auto", "recompute", "swap"):
            raise ConfigError(f"preemption={self.preemption!r} is unknown: use auto, recompute or swap")
        if self.preemption == "swap" and not self.num_host_blocks:
            raise ConfigError("preemption='swap' needs num_host_blocks above 0")
        if self.depth is not None and self.depth < 0:
            raise ConfigError(f"depth={self.depth} must be 0 (no overlap) or more")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded replica tells of its model: measured facts, kept apart from the configuration."""

    model: str
    served_model_name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    num_host_blocks: int
    block_size: int
    device: str
    dtype: str
    depth: int
    attention_backend: str
    lora_backend: str
    tokenizer: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
