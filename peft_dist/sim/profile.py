"""What a device's work costs, in a file: measured there, or scaled from what was by a rule that the file tells."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.core.errors import ConfigError

FORMAT = 1
FOLDER = Path(__file__).parent / "profiles"
_SUFFIX = ".json"
_SIZES = ("prompt_sizes", "decode_sizes")


@dataclass(frozen=True, slots=True)
class CostProfile:
    """One replica on one kind of device.

    Attributes:
        name: What results call it.
        source: Measured where and how, or scaled from what by which rule.
        hardware: The devices of one replica, in words.
        model: The base model, in words.
        versions: Of the packages that were measured; empty where nothing was.
        costs: Seconds of steps, switches, loads, swaps and moves of KV (docs/policies.md, cost model).
        num_blocks: KV blocks of a replica.
        block_bytes: Of one KV block, over all layers and ranks.
        block_size: Tokens in a KV block.
        max_model_len: Longest prompt and output together, in tokens.
        max_num_seqs: Most sequences in one step.
        max_num_batched_tokens: Most tokens in one step.
        max_loras: Adapters on a device at once.
        tensor_parallel_size: Devices of one replica.
        modules: Modules that an adapter of rank r adapts: it has r rank rows in each.
        rank_bytes: Bytes of an adapter for each of its rank, over all modules.
        host_seconds: Scheduling and reporting add to a step where none is in flight.
        message_seconds: A command or a report is under way.
        depth: Steps in flight while the next one is scheduled.
        weight_bytes: Of the base's weights on all devices; 0: not told.
        num_held: Merged copies that are kept beside the base's weights; 0: weights are merged in place.
        prompt_sizes: Tokens of the captured steps with prompts in them, the smallest first: a step of fewer computes
            as many as the next one has. Larger steps are not captured. Empty: none is.
        decode_sizes: The same of steps without prompts, in sequences.
        context_token: Seconds that a decode takes for each token of its sequence that is in the KV cache, beyond the
            ``context`` tokens at which ``costs`` were measured; as much less for each token short of them.
        context: Mean tokens in the KV cache of a decode in what ``costs`` were fitted to.
        loads_at_once: Loads of adapters that run at the same time, each as long as ``costs`` say; others wait for
            their turn, in order. 0: all run at once.
    """

    name: str
    source: str
    hardware: str
    model: str
    costs: CostPrior
    num_blocks: int
    block_bytes: int
    modules: int
    rank_bytes: int
    versions: dict[str, str] = field(default_factory=dict)
    block_size: int = 16
    max_model_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_loras: int = 64
    tensor_parallel_size: int = 1
    host_seconds: float = 0.0
    message_seconds: float = 2e-4
    depth: int = 0
    num_held: int = 0
    weight_bytes: int = 0
    prompt_sizes: tuple[int, ...] = ()
    decode_sizes: tuple[int, ...] = ()
    context_token: float = 0.0
    context: float = 0.0
    loads_at_once: int = 0

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            least = 0 if option.name in ("depth", "num_held", "weight_bytes", "loads_at_once") else 1
            if option.type == "int" and not (type(value) is int and value >= least):
                raise ConfigError(f"{option.name}={value!r} of profile {self.name!r} must be {least} or more")
            if option.type == "float" and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{option.name}={value!r} of profile {self.name!r} must be 0 or more, and finite")
        for name in _SIZES:
            sizes = getattr(self, name)
            if not all(type(size) is int and size > 0 for size in sizes) or list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"{name}={sizes!r} of profile {self.name!r} must be numbers, the smallest first")

    def truth(self) -> CostModel:
        """What everything takes: a model that learns nothing."""
        return CostModel(self.costs, fixed=True)

    def adapter(self, name: str, rank: int) -> AdapterSpec:
        """An adapter of this rank in all modules."""
        # One entry for all modules: only their sum counts, and many are summed for every request of every step.
        return AdapterSpec(name, f"{name}/{rank}", name, {"all modules": rank * self.modules}, rank * self.rank_bytes)

    def dump(self, path: Path) -> None:
        """Write a file that ``load`` reads; the same profile gives the same bytes. Raises ConfigError."""
        told = asdict(self)
        for name in (*_SIZES, "context_token", "context", "loads_at_once"):
            if not told[name]:  # So that files from before there were any stay what they are.
                del told[name]
        text = json.dumps({"peft_dist_profile": FORMAT, **told}, indent=1) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"profile {path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, name_or_path: str | Path) -> CostProfile:
        """A profile of the package, by name, or one in a file. Raises ConfigError."""
        path = _find(name_or_path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"profile {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"profile {path} is no JSON: {error}") from error
        if not isinstance(document, dict) or document.pop("peft_dist_profile", None) != FORMAT:
            raise ConfigError(f"{path} is no profile of format {FORMAT}: write it with scripts/profile_costs.py")
        return cls.of(document, f"profile {path}")

    @classmethod
    def of(cls, told: Mapping[str, Any], where: str) -> CostProfile:
        """What ``asdict`` gave, back from JSON. ``where``: What errors call it. Raises ConfigError."""
        rest = dict(told)
        try:
            costs: dict[str, Any] = rest.pop("costs")
            pairs: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in costs.items()
            }
            sizes: dict[str, Any] = {name: tuple(rest.pop(name, ())) for name in _SIZES}
            return cls(costs=CostPrior(**pairs), **sizes, **rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{where} is broken ({error!r}): measure it again") from error


def names() -> list[str]:
    """Profiles of the package."""
    return sorted(path.stem for path in FOLDER.glob(f"*{_SUFFIX}"))


def _find(name_or_path: str | Path) -> Path:
    packaged = FOLDER / f"{name_or_path}{_SUFFIX}"
    if isinstance(name_or_path, str) and packaged.parent == FOLDER and packaged.is_file():
        return packaged
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"there is no profile {str(name_or_path)!r}: give a file, or one of {', '.join(names())}")
    return path


def options_of(info: ModelInfo, config: EngineConfig) -> dict[str, Any]:
    """What a replica that was measured says of itself, as arguments of ``CostProfile``."""
    return {
        "num_blocks": info.num_blocks,
        "block_bytes": info.block_bytes,
        "block_size": info.block_size,
        "max_model_len": info.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_loras": config.max_loras,
        "tensor_parallel_size": info.tensor_parallel_size,
        "depth": info.depth,
        "num_held": 1 if info.merge_way == "shadow" else 0,
    }
