"""The processes that run one replica together, each with its part of every weight."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import distributed as dist
from transformers import PreTrainedModel

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.rank_meeting import inherited_listener
from peft_dist.patches.sharding import ModulePart, UnsupportedShardingError, combine_outputs, shard_model
from peft_dist.runner.adapter_modules import ModuleShape
from peft_dist.runner.loader import resolve_device

logger = logging.getLogger(__name__)

# Of one meeting of all ranks. Steps have the orchestrator's own limit, which is shorter.
_MEETING = datetime.timedelta(minutes=10)


class RankGroup:
    """One rank's view of them all; of one rank alone it does nothing.

    Attributes:
        rank: 0 has the engine, and the others do what it does.
        parts: Of the modules that are split; empty before ``shard``.
    """

    def __init__(self, rank: int = 0, size: int = 1, meeting_place: object = None) -> None:
        """``meeting_place``: What is to live as long as the ranks may meet."""
        self.rank, self.size = rank, size
        self._meeting_place = meeting_place
        self.parts: Mapping[str, ModulePart] = {}

    @property
    def is_split(self) -> bool:
        return self.size > 1

    def shard(self, model: PreTrainedModel) -> Mapping[str, ModulePart]:
        """Keep this rank's part of the weights; by path, what is left.

        Raises:
            ConfigError: the model cannot be split so.
        """
        try:
            self.parts = shard_model(model, self.rank, self.size)
        except UnsupportedShardingError as error:
            raise ConfigError(
                f"tensor_parallel_size={self.size}: {error}. Choose another size, or run one process a replica "
                "(tensor_parallel_size=1, and --replicas for more of them)"
            ) from error
        whole = [path for path in ("embedding", "output layer") if not self._splits(model, path)]
        if whole:
            logger.warning(
                "%s kept whole by each of %d ranks: its tokens do not divide", " and ".join(whole), self.size
            )
        return self.parts

    def _splits(self, model: PreTrainedModel, kind: str) -> bool:
        module = model.get_input_embeddings() if kind == "embedding" else model.get_output_embeddings()
        return any(model.get_submodule(path) is module for path in self.parts)

    def combine(self, model: PreTrainedModel) -> None:
        """After ``shard``: have layers bring the ranks' outputs together."""
        combine_outputs(model, self.parts)

    def smallest(self, number: int) -> int:
        """Over all ranks."""
        return min(self.agree(number))

    def agree(self, value: Any) -> list[Any]:
        """What each rank says; all have to come by."""
        if not self.is_split:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def check_alike(self, option: str, value: object) -> None:
        """Raises ConfigError unless all ranks have the same."""
        values = self.agree(value)
        if any(other != value for other in values):
            found = ", ".join(f"{other} on rank {rank}" for rank, other in enumerate(values))
            raise ConfigError(
                f"{option} means {found}: the ranks of a replica have to be alike, so give {option} a value, or the "
                "ranks the same memory"
            )

    def whole(self, modules: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
        """The modules as they are over all ranks, which is how adapters' files describe them."""
        squares = self._row_squares(modules)
        return {path: self._whole(path, module, squares.get(path)) for path, module in modules.items()}

    def _whole(self, path: str, module: ModuleShape, squares: float | None) -> ModuleShape:
        part = self.parts.get(path)
        if part is None:
            return module
        inputs = module.in_features if part.inputs is None else part.inputs.whole
        outputs = module.out_features if part.outputs is None else part.outputs.whole
        num_outputs = inputs if module.kind == "embedding" else outputs
        row_rms = None if squares is None else (squares / num_outputs) ** 0.5
        return replace(module, in_features=inputs, out_features=outputs, row_rms=row_rms, part=part)

    def _row_squares(self, modules: Mapping[str, ModuleShape]) -> dict[str, float]:
        """Squared norm of the whole weight of each module that is split and may be merged into."""
        own = {}
        for path, part in self.parts.items():
            module = modules[path]
            if module.row_rms is not None:
                num_outputs = module.in_features if module.kind == "embedding" else module.out_features
                own[path] = module.row_rms**2 * num_outputs / part.copies
        every = self.agree(own)
        return {path: sum(squares[path] for squares in every) for path in own}


def join_ranks(config: EngineConfig) -> RankGroup:
    """Meet the other ranks of a launch, where there are to be any, and take this rank's device.

    Raises:
        ConfigError: this process was not launched as one of so many, or there are fewer devices.
    """
    size = config.tensor_parallel_size
    if size == 1:
        return RankGroup()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != size:
        raise ConfigError(
            f"tensor_parallel_size={size} takes as many processes, and {started} of them run here: start the replica "
            "with peft-dist serve --tensor-parallel-size, or as many LLMs with tensor_parallel_size=1"
        )
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    backend = "gloo"
    if resolve_device(config.device).type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"tensor_parallel_size={size} takes a GPU for each rank, and torch sees {torch.cuda.device_count()}: "
                "lower it, or let this replica see more (CUDA_VISIBLE_DEVICES)"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    meeting_place = _open_meeting_place()
    dist.init_process_group(backend, timeout=_MEETING)
    return RankGroup(rank, size, meeting_place)


def _open_meeting_place() -> dist.TCPStore | None:
    """Answer at the port that was opened for this rank to be the one where all meet."""
    listener = inherited_listener()
    if listener is None:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener)


def leave_ranks() -> None:
    """End the connections, on which other ranks may be waiting; nothing where there are none."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
