"""The base model: read, placed, and made ready for packed forwards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.patches import catalog
from peft_dist.patches.registry import UnsupportedVersionError, check_versions
from peft_dist.patches.sharding import ModulePart
from peft_dist.runner.random_weights import random_model

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICES = "auto, cpu, cuda or cuda:N"
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def resolve_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" names.

    Raises:
        ConfigError: it is none of them, or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is unknown: use {_DEVICES}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported: use {_DEVICES}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch sees no CUDA device: use device='cpu' or install a CUDA torch")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r}, but torch sees {torch.cuda.device_count()} CUDA devices: use a lower number"
        )
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def resolve_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU and the checkpoint's dtype on a GPU."""
    if name == "auto":
        stored = getattr(config, "dtype", None) or torch.float32
        return torch.float32 if device.type == "cpu" else stored
    if name not in _DTYPES:
        raise ConfigError(f"dtype={name!r} is unknown: use auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def check_libraries() -> None:
    """Raises ConfigError for versions of transformers or PEFT that the patches were not tested with."""
    try:
        check_versions(catalog.PATCHES)
    except UnsupportedVersionError as error:
        raise ConfigError(str(error)) from error


def _check_folder(model: str) -> None:
    """Say what transformers says as if it were about the Hub. Raises ConfigError."""
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise ConfigError(
                f"cannot load the base model {model!r}: there is no such folder. Correct the path, or give a hub id "
                "like org/name"
            )
    elif (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise ConfigError(
            f"cannot load the base model {model!r}: it is an adapter. Give the model that it was trained on (in "
            "adapter_config.json: base_model_name_or_path), and the adapter beside it (--adapter NAME=PATH, adapters=)"
        )


def load_model(
    options: EngineConfig,
    device: torch.device,
    shrink: Callable[[PreTrainedModel], Mapping[str, ModulePart]] | None = None,
) -> PreTrainedModel:
    """Load the base in evaluation mode on ``device``.

    Args:
        shrink: Drops weights that are not wanted there, before the others are brought there, and tells what is left
            of each module.

    Raises:
        ConfigError: nothing loadable is there, or it is no decoder.
    """
    check_libraries()
    _check_folder(options.model)
    source: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(options.model, **source)
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"{options.model} is an encoder-decoder model; only decoder-only models are served")
        dtype = resolve_dtype(options.dtype, config, device)
        _longest(config, options.max_model_len)  # Before weights are read for minutes.
        if options.load_format == "dummy":
            model = random_model(config, dtype, device, options, shrink)
            shrink = None
        else:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **source)
    except (OSError, KeyError, ValueError, ImportError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).rstrip(". ")
        raise ConfigError(
            f"cannot load the base model {options.model!r}: {reason}. Give a folder with config.json and safetensors, "
            "or a hub id that is reachable or cached"
        ) from error
    model.requires_grad_(False)
    if shrink is not None:
        shrink(model)
    return model.eval().to(device)


def max_positions(model: PreTrainedModel, wanted: int | None) -> int:
    """Longest sequence that the model can take, at most ``wanted``.

    "dynamic" and "longrope" rotary embeddings choose their frequencies by the longest sequence of the packed
    batch, so a neighbour could change a request's tokens. Within the length the model was first trained for
    they do not, so that is where such a model is limited.

    Raises:
        ConfigError: ``wanted`` is more than that, or nothing says how long it is.
    """
    limit, stable = _longest(model.config, wanted)
    if stable is not None:
        logger.warning(
            "rotary embeddings beyond %d tokens depend on the whole batch: max_model_len is %d", stable, stable
        )
    return int(limit if wanted is None else wanted)


def _longest(whole: PreTrainedConfig, wanted: int | None) -> tuple[int, int | None]:
    """The most that a model of this configuration can take, and where that is so for its rotary embeddings' sake."""
    config = whole.get_text_config()
    limit = next((getattr(config, key) for key in _LENGTH_KEYS if getattr(config, key, None)), None)
    if limit is None and wanted is None:
        raise ConfigError(f"a {config.model_type} model states no maximum length: give max_model_len")
    stable = _stable_rope_length(config)
    if stable is not None and limit is not None and stable >= limit:
        stable = None
    limit = limit if stable is None else stable
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(f"max_model_len={wanted} exceeds what the model supports ({limit}): lower it or leave it out")
    return int(limit or wanted or 0), stable


def _stable_rope_length(config: Any) -> int | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    lengths = []
    for rope in nested or [parameters]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            lengths.append(
                original or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            )
    return min(lengths) if lengths else None


def end_of_sequence_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a sequence, from the generation configuration and the configuration."""
    ids: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        value = getattr(config, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ids))


def load_tokenizer(options: EngineConfig) -> Any | None:
    """The model's Hugging Face tokenizer; None where it has none. Over a damaged one the library raises anything."""
    if not has_tokenizer(options.model):
        return None
    return AutoTokenizer.from_pretrained(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )


def has_tokenizer(folder: str) -> bool:
    """Whether a local folder brings a tokenizer; a hub id is taken to have one."""
    path = Path(folder)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model")
    return not path.is_dir() or any((path / name).exists() for name in names)
