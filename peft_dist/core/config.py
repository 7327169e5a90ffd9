"""Configuration, built once at the entry point and never changed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, cast, get_args

from peft_dist.core.errors import ConfigError

Preemption = Literal["auto", "recompute", "swap"]
MergeMethod = Literal["auto", "shadow", "host", "off"]
AttentionName = Literal["auto", "vllm-flash-attn", "flashinfer", "triton", "c", "torch"]
KVTransfer = Literal["auto", "host", "nixl"]
LoadFormat = Literal["auto", "dummy"]

_BYTE_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _BYTE_UNITS.update({f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power})


def parse_bytes(option: str, text: str) -> int:
    """Bytes from "512MiB", "1.5GiB", "2GB" (powers of 1000) or a bare number. Raises ConfigError naming the option."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _BYTE_UNITS:
        raise ConfigError(f"{option} {text!r} is no size: write for example 512MiB or 2GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one replica.

    Attributes:
        model: Folder or hub id of the base model.
        served_model_name: What users call the base; the last part of ``model`` when None.
        revision: Hub revision of the base model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's on a GPU, float32 on CPU), "float32", "bfloat16" or "float16".
        load_format: "auto" reads the checkpoint; "dummy" needs config.json alone and draws random weights from ``seed``
            on the device, as the model initialises itself (for benchmarks: the answers mean nothing).
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
        adapter_device_memory: Bytes on the device for adapters, shared out to all modules that can be adapted, the
            same number of rank rows to each. None is room for ``max_loras`` adapters of rank 16 (on CPU, where
            memory that was never written costs nothing, of rank 64), and for one of rank 256 at least.
        adapter_host_memory: Bytes of host memory for copies of adapters, from which they get to the device faster
            than from disk. 0 keeps none. None is 2 GiB, and with a GPU a sixteenth of what is free, up to 16 GiB.
        adapter_load_timeout: Seconds for finding, reading and checking one adapter; None is no limit.
        pinned_adapters: Names of adapters given at the start that are loaded at once and stay on the device.
        tensor_parallel_size: Processes, each on a device of its own, that the weights of one replica are split over.
        num_threads: CPU threads of the model; torch's default when None.
        pack_weights: Keep a copy of the weights in the CPU library's packed layout (faster, twice the
            memory); None packs on CPU when the copy fits in half of the free memory.
        compile_kernels: Build the C kernels on first use on a CPU (needs gcc); off falls back to torch.
        enforce_eager: Capture no CUDA graphs: decode steps run operator by operator, as prefills do.
        fuse: On a GPU, join the weights of q/k/v and of gate/up and run norms, gates and rotary embedding as kernels of
            this package, in the modules whose code is known; off runs Hugging Face's code.
        attention_backend: "auto" takes the fastest that is installed: on a GPU "vllm-flash-attn" (found in vllm, the
            kernels package or vllm_flash_attn), "flashinfer", "triton" or "torch", on a CPU "c" or "torch". A layer
            that it does not take runs in the next one. Where steps are captured, "auto" takes "flashinfer", which is
            planned on the host, only where nothing else runs on the GPU.
        kv_transfer: Where KV that moves to another replica of the host lies on its way: "auto" in device memory if a
            GPU offers it, "host" in host memory. "nixl" is "auto", and to other hosts it goes by NIXL where both have
            it (unencrypted), over TCP where not.
        seed: Seeds the seeds of requests that bring none; None draws from the system.
        trust_remote_code: Let the base model's repository run code. No adapter can set it.
        policy: "credit" (dLoRA), "merge" (merged only) or "fcfs" (unmerged only); None is "credit", and "merge" for
            the execution types that know nothing else.
        exec_type: "dlora", or a baseline that runs one adapter at a time: "peft" (merged, no LoRA kernel) or "vllm"
            (each adapter a whole merged model, a few of them resident).
        resident_models: Merged models on the device at once with exec_type="vllm" (and with no other).
        policy_profile: "default", or "artifact" for the constants and batching rules of the paper's artifact, which
            know no ``max_adapter_wait`` and no ``merged_minority``.
        max_adapter_wait: Seconds that a request may be overtaken by younger ones.
        merge: Where merged weights live: "shadow" (a second buffer), "host" (in place, the base's bits on the host),
            "auto" (shadow where it fits), "off" (nothing is merged). With exec_type="vllm" only "auto".
        merged_minority: Let requests of other adapters join a merged batch, corrected by the LoRA kernel. With the
            policy "credit" alone.
        decision_log: File that gets every step's decision as a line of JSON.
        cost_profile: File with the measured seconds of steps and switches: read at the start if it is there and of this
            model on this device, written when the replica is closed.
    """

    model: str
    served_model_name: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    load_format: LoadFormat = "auto"
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
    adapter_device_memory: int | None = None
    adapter_host_memory: int | None = None
    adapter_load_timeout: float | None = 120.0
    pinned_adapters: tuple[str, ...] = ()
    tensor_parallel_size: int = 1
    num_threads: int | None = None
    pack_weights: bool | None = None
    compile_kernels: bool = True
    enforce_eager: bool = False
    fuse: bool = True
    attention_backend: AttentionName = "auto"
    kv_transfer: KVTransfer = "auto"
    seed: int | None = None
    trust_remote_code: bool = False
    policy: str | None = None
    exec_type: str = "dlora"
    resident_models: int = 2
    policy_profile: str = "default"
    max_adapter_wait: float = 5.0
    merge: MergeMethod = "auto"
    merged_minority: bool = False
    decision_log: str | None = None
    cost_profile: str | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            _check(option.name, str(option.type).split(" | "), getattr(self, option.name))
        if self.preemption == "swap" and not self.num_host_blocks:
            raise ConfigError("preemption='swap' needs num_host_blocks above 0")
        if problem := next(_contradictions(self), None):
            raise ConfigError(problem)


def check_pinned(options: EngineConfig, names: Collection[str]) -> None:
    """Raises ConfigError when an adapter to be pinned is not among the ``names`` given at the start."""
    for name in options.pinned_adapters:
        if name not in names:
            raise ConfigError(
                f"pinned_adapters (--pin-adapter) names {name!r}, which is no adapter given at the start: give it "
                "there, or pin it when it is loaded"
            )


def _contradictions(options: EngineConfig) -> Iterator[str]:
    """What one option asks for and another leaves no room for; an option that has its default asks for nothing."""
    policy, exec_type, profile = (f"{n}={getattr(options, n)!r}" for n in ("policy", "exec_type", "policy_profile"))
    if options.exec_type != "dlora" and options.policy not in (None, "merge"):
        yield f"{exec_type} runs one adapter at a time: {policy} needs exec_type='dlora'"
    if options.merge == "off" and (options.policy == "merge" or options.exec_type != "dlora"):
        asked = exec_type if options.exec_type != "dlora" else policy
        yield f"merge='off' leaves only unmerged execution, {asked} only merged: use policy 'fcfs' or 'credit'"
    if options.exec_type == "vllm" and options.merge in ("shadow", "host"):
        yield (
            f"merge={options.merge!r} says where one merged adapter lives, but {exec_type} keeps whole merged models "
            "(resident_models of them): leave merge at 'auto'"
        )
    if options.exec_type == "vllm" and options.pinned_adapters:
        yield f"pinned_adapters={options.pinned_adapters} stay as adapters, but {exec_type} keeps whole merged models"
    if options.exec_type != "vllm" and options.resident_models != _DEFAULTS["resident_models"]:
        yield f"resident_models={options.resident_models} counts the models of exec_type='vllm', not of {exec_type}"
    if options.tensor_parallel_size > 1:
        yield from _against_ranks(options)
    if options.merged_minority:
        minority = "merged_minority=True lets others join a batch of policy='credit' that is merged"
        if options.exec_type != "dlora" or options.policy not in (None, "credit"):
            yield f"{minority}: {exec_type if options.exec_type != 'dlora' else policy} has no such batch"
        if options.merge == "off":
            yield f"{minority}: merge='off' merges none"
        if options.policy_profile == "artifact":
            yield f"{minority}, which the paper's artifact does not know: leave it out, or {profile}"
    if options.policy_profile == "artifact" and options.max_adapter_wait not in (
        _DEFAULTS["max_adapter_wait"],
        math.inf,
    ):
        yield f"{profile} has no bound on waiting: leave out max_adapter_wait={options.max_adapter_wait}"


def _against_ranks(options: EngineConfig) -> Iterator[str]:
    asked = f"tensor_parallel_size={options.tensor_parallel_size}"
    if options.exec_type == "vllm":
        yield f"{asked} splits one model, and exec_type='vllm' keeps whole merged ones: use 'peft' or 'dlora'"
    if options.device.startswith("cuda:"):
        yield f"{asked} takes a device for each rank, device={options.device!r} names one: use device='cuda'"


_DEFAULTS = {option.name: option.default for option in fields(EngineConfig)}
_KINDS: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bool": bool,
    "Preemption": str,
    "MergeMethod": str,
    "AttentionName": str,
    "KVTransfer": str,
    "LoadFormat": str,
    "tuple[str, ...]": tuple,
    "None": type(None),
}
_AT_LEAST_1 = (
    *("max_model_len", "block_size", "num_blocks", "kv_cache_bytes", "max_num_seqs", "max_num_batched_tokens"),
    *("max_loras", "num_threads", "tensor_parallel_size", "resident_models", "adapter_device_memory"),
)
_LEAST = dict.fromkeys(_AT_LEAST_1, 1) | {"num_host_blocks": 0, "depth": 0, "adapter_host_memory": 0}
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "preemption": get_args(Preemption),
    "merge": get_args(MergeMethod),
    "attention_backend": get_args(AttentionName),
    "kv_transfer": get_args(KVTransfer),
    "load_format": get_args(LoadFormat),
    "policy_profile": ("default", "artifact"),
    "exec_type": ("dlora", "peft", "vllm"),
    "policy": ("credit", "merge", "fcfs", None),
}


def _check(name: str, kinds: list[str], value: object) -> None:
    """Raises ConfigError when an option has another type than one of ``kinds``, or lies outside of its range."""
    fits = any(isinstance(value, _KINDS[kind]) for kind in kinds) and (not isinstance(value, bool) or "bool" in kinds)
    wanted = " or ".join(kinds)
    if name in _CHOICES:
        wanted = f"one of {', '.join(map(str, _CHOICES[name]))}"
        fits = fits and value in _CHOICES[name]
    elif name in _LEAST:
        wanted = wanted.replace("int", f"an int of at least {_LEAST[name]}")
        fits = fits and (value is None or cast(int, value) >= _LEAST[name])
    elif name == "gpu_memory_utilization":
        wanted = "a share above 0 and up to 1"
        fits = fits and 0 < cast(float, value) <= 1
    elif name == "adapter_load_timeout":
        wanted = "seconds above 0, or None"
        fits = fits and (value is None or cast(float, value) > 0)
    elif name == "max_adapter_wait":
        wanted = "seconds of 0 or more"
        fits = fits and cast(float, value) >= 0
    elif name == "pinned_adapters":
        wanted = "a tuple of names"
        fits = fits and all(isinstance(own, str) and own for own in cast(tuple[object, ...], value))
    elif name == "model":
        wanted = "a folder or hub id"
        fits = fits and bool(value)
    if not fits:
        raise ConfigError(f"{name}={value!r} cannot be used: give {wanted}")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded replica tells of its model: measured facts, kept apart from the configuration.

    ``block_bytes`` are those of one KV block over all layers and ranks, ``adapter_bytes`` what adapters can take on the
    device; 0 where they are not known. ``max_loras`` adapters can be there at once. ``merge_way`` is "shadow", "host"
    or "off", ``merge_bytes`` what its second copies take. ``fingerprint`` is equal for equal weights; empty: not known.
    """

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
    block_bytes: int = 0
    max_loras: int = 0
    adapter_bytes: int = 0
    merge_way: str = "off"
    merge_bytes: int = 0
    tokenizer: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    tensor_parallel_size: int = 1
    fingerprint: str = ""

    @property
    def kv_size(self) -> tuple[int, int]:
        """What must be the same for one replica's KV blocks to be of use to another: ranks have their own parts."""
        return self.block_bytes, self.tensor_parallel_size
