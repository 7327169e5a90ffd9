"""The fields of PEFT's LoRA configuration, sorted by what they mean for serving."""

from __future__ import annotations

from typing import Any

from peft_dist.core.errors import UnfitAdapterError

READ_FIELDS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "ensure_weight_tying",
        "base_model_name_or_path",
    }
)

# JSON's true and false only. PEFT takes "no" and "false" for true; whoever wrote them did not mean that.
BOOLEAN_FIELDS = ("use_rslora", "ensure_weight_tying", "use_dora", "lora_bias", "use_qalora")

# Served as PEFT serves it: these change training, merging or bookkeeping, not the answers of the adapter.
# (fan_in_fan_out only turns the merged product; PEFT corrects a wrong value from the layer's class.)
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
}

# Field -> (what it is called, what the user can do about it).
_MERGE = "merge it into the base model with PEFT's merge_and_unload and serve that model"
_TRAIN = "train a plain LoRA adapter"
_UNSUPPORTED: dict[str, tuple[str, str]] = {
    "use_dora": ("DoRA", _MERGE),
    "lora_bias": ("LoRA with a bias of its own", _TRAIN + " (lora_bias=False)"),
    "modules_to_save": ("trained copies of whole modules", _MERGE),
    "trainable_token_indices": ("trained token embeddings", _MERGE),
    "layer_replication": ("layer replication", _MERGE),
    "megatron_config": ("Megatron layers", _TRAIN),
    "alora_invocation_tokens": ("activated LoRA (aLoRA)", _TRAIN),
    "target_parameters": ("LoRA on bare parameters", _MERGE),
    "use_qalora": ("QALoRA", _TRAIN),
    "use_bdlora": ("block-diagonal LoRA", _TRAIN),
    "arrow_config": ("Arrow routing", _TRAIN),
    "kasa_config": ("KaSA", _TRAIN),
    "velora_config": ("VeLoRA", _TRAIN),
    "monteclora_config": ("MonteCLoRA", _TRAIN),
}

IGNORED_FIELDS = frozenset(_WITHOUT_EFFECT | _UNSUPPORTED.keys())

_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Raises UnfitAdapterError, naming the kind, when the configuration is not of a plain LoRA adapter."""
    kind = config.get("peft_type")
    if kind is None:
        raise UnfitAdapterError("adapter_config.json names no peft_type: save the adapter with PEFT's save_pretrained")
    if kind != "LORA":
        raise UnfitAdapterError(f"peft_type={kind!r} is not supported, only LORA is: {_TRAIN}, or {_MERGE}")
    for field, (what, remedy) in _UNSUPPORTED.items():
        if config.get(field):
            raise UnfitAdapterError(f"{what} ({field}={config[field]!r:.200}) is not supported: {remedy}")
    if config.get("bias") not in (None, "none"):
        raise UnfitAdapterError(
            f"trained biases of the base (bias={config['bias']!r:.200}) are not supported: {_MERGE}"
        )
    _refuse_init(config.get("init_lora_weights", True))


def _refuse_init(init: object) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init in _PLAIN_INITS):
        return
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise UnfitAdapterError(
            f"init_lora_weights={init!r:.200} changed the base model's weights, so the adapter does not fit the "
            "original: convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    raise UnfitAdapterError(f"init_lora_weights={init!r:.200} is unknown, so the base it fits is unknown: {_TRAIN}")
