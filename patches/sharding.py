"""A model's weights split over the ranks of a tensor-parallel group, by the plan that transformers keeps for it.

Parameters stay plain tensors, only smaller: whatever packs, joins, merges or multiplies weights does so with a rank's
part. (transformers' own sharding makes DTensors, and sums inside of the row-parallel layer, so that an adapter's part
of it would need a second all-reduce.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_dist.patches.lora_wrapping import wrap_module
from peft_dist.patches.rank_outputs import Gathered, Reduced, Vocabulary

_COLUMN, _ROW = "colwise", "rowwise"
_GATHERED = ("colwise_gather_output", "colwise_rep")
_QUERY, _KEY_VALUE = "q_proj", ("k_proj", "v_proj")


class UnsupportedShardingError(ValueError):
    """A model cannot be split over so many ranks."""


class Span(NamedTuple):
    """Elements ``first`` up to ``last`` of a dimension with ``whole`` of them."""

    first: int
    last: int
    whole: int

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """A view of the part."""
        return tensor.narrow(dim, self.first, self.last - self.first)


@dataclass(frozen=True, slots=True)
class ModulePart:
    """What of a module's weight a rank has.

    Attributes:
        outputs: Of ``out_features``; None: all. A's rows stay whole then, and B's are split, or the other way round.
        inputs: Of ``in_features`` (an embedding: of its ids); None: all.
        copies: Ranks that have this very part.
    """

    outputs: Span | None = None
    inputs: Span | None = None
    copies: int = 1

    def of_adapter(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of A ``[r, in_features]`` and B ``[out_features, r]``."""
        return (
            A if self.inputs is None else self.inputs.of(A, 1),
            B if self.outputs is None else self.outputs.of(B, 0),
        )

    def of_weight(self, weight: torch.Tensor, *, turned: bool = False) -> torch.Tensor:
        """A view of a weight ``[out, in]``, or ``[in, out]`` where it is ``turned`` (an embedding's)."""
        for span, dim in ((self.outputs, int(turned)), (self.inputs, int(not turned))):
            weight = weight if span is None else span.of(weight, dim)
        return weight


def shard_model(model: PreTrainedModel, rank: int, size: int) -> dict[str, ModulePart]:
    """Keep a rank's part of every weight of a stock model that is on its plan, and drop the rest. In place.

    Query heads are split; so are key and value heads, or each is kept by several ranks where there are fewer heads.
    Embedding and output layer are split by tokens, and stay whole where their number does not divide by ``size``.
    ``combine_outputs`` has to follow.

    Returns:
        By path, what is left of the modules that were split.

    Raises:
        UnsupportedShardingError: the architecture has no plan, or one with other than linear layers, or its sizes do
            not divide; nothing has changed.
    """
    parts = dict(_plan(model, rank, size))
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = output.weight is embedding.weight
    for path, part in parts.items():
        _cut(model.get_submodule(path), part, rank)
    if is_tied:
        output.weight = embedding.weight
    for module in model.modules():
        _fit_groups(module)
    return parts


def combine_outputs(model: PreTrainedModel, parts: Mapping[str, ModulePart]) -> None:
    """Put LoRA layers, which have no adapters yet, where ranks have to bring their outputs together.

    There an adapter's part joins the layer's own before the one all-reduce (or gather) of both.
    """
    output = model.get_output_embeddings()
    for path, part in parts.items():
        module = model.get_submodule(path)
        combination = None
        if isinstance(module, nn.Embedding):
            assert part.inputs is not None, "embeddings are split by tokens"
            combination = Vocabulary(part.inputs.first, part.inputs.last)
        elif part.inputs is not None:
            combination = Reduced()
        elif module is output:
            assert part.outputs is not None, "the output layer is split by tokens"
            combination = Gathered(part.outputs.whole // (part.outputs.last - part.outputs.first))
        if combination is not None:
            layer = wrap_module(model, path)
            layer.combination = cast(Any, combination)


def num_outputs(model: PreTrainedModel) -> int:
    """Logits of one row, over all ranks."""
    layer: Any = model.get_output_embeddings()
    combination = getattr(layer, "combination", None)
    ranks = combination.size if isinstance(combination, Gathered) else 1
    return int(layer.weight.shape[0]) * ranks


def _plan(model: PreTrainedModel, rank: int, size: int) -> Iterator[tuple[str, ModulePart]]:
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    name = type(model).__name__
    if not any(style == _ROW for style in plan.values()):
        raise UnsupportedShardingError(f"transformers has no plan for splitting {name} over ranks")
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    known = {re.sub(r"\d+", "*", path): path for path, _ in model.named_parameters()}
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\d+", "*", path))
        if module in (output, embedding):
            whole = module.weight.shape[0]
            if whole % size == 0 and type(module.weight) is nn.Parameter:
                yield path, _split_tokens(module, Span(rank * whole // size, (rank + 1) * whole // size, whole))
            continue
        if style is None or style.startswith("replicated"):
            continue
        if style not in (_COLUMN, _ROW) or type(module) is not nn.Linear or not _is_dense(module):
            raise UnsupportedShardingError(
                f"{path} of {name} ({type(module).__name__}, {style!r} in its plan) cannot be split over ranks here"
            )
        yield path, _split_linear(model, path, module, style, rank, size)
    strange = sorted(key for key, style in plan.items() if key in known and not style.startswith("replicated"))
    if strange:
        raise UnsupportedShardingError(f"{strange[0]} of {name} is split by its plan, which is not done here")


def _split_tokens(module: nn.Module, span: Span) -> ModulePart:
    return ModulePart(inputs=span) if isinstance(module, nn.Embedding) else ModulePart(outputs=span)


def _is_dense(module: nn.Linear) -> bool:
    return type(module.weight) is nn.Parameter and module.weight.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )


def _split_linear(model: nn.Module, path: str, module: nn.Linear, style: str, rank: int, size: int) -> ModulePart:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    unit = 1
    if hasattr(parent, "layer_idx"):
        _check_attention(parent_path, parent, name, style)
        unit = cast(int, parent.head_dim)
    whole = module.out_features if style == _COLUMN else module.in_features
    if whole % unit:
        raise UnsupportedShardingError(f"{path}: {whole} features are no whole heads of {unit}")
    count, copies = whole // unit, 1
    what = "heads" if unit > 1 else "features"
    if name in _KEY_VALUE and count < size:
        if size % count:
            raise UnsupportedShardingError(f"{path}: {count} {what} cannot be shared out to {size} ranks")
        copies = size // count
    elif count % size:
        raise UnsupportedShardingError(f"{path}: {count} {what} cannot be split over {size} ranks")
    share = max(count // size, 1) * unit
    first = rank // copies * share
    span = Span(first, first + share, whole)
    return ModulePart(outputs=span, copies=copies) if style == _COLUMN else ModulePart(inputs=span)


def _check_attention(path: str, module: nn.Module, name: str, style: str) -> None:
    """Heads are split, so nothing else in there may know how many there are."""
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int) or (style == _COLUMN and name != _QUERY and name not in _KEY_VALUE):
        raise UnsupportedShardingError(f"{path}.{name} is no projection whose heads are known here")
    others = [
        (child, weight)
        for child, weight in module.named_parameters()
        if not child.endswith(("_proj.weight", "_proj.bias"))
    ]
    for child, weight in others:
        if not isinstance(module.get_submodule(child.rpartition(".")[0]), nn.Linear) and weight.numel() != head_dim:
            raise UnsupportedShardingError(f"{path}.{child} {list(weight.shape)} is not the same for every head")


def _cut(module: nn.Module, part: ModulePart, rank: int) -> None:
    is_embedding = isinstance(module, nn.Embedding)
    view = part.of_weight(cast(nn.Parameter, module.weight).detach(), turned=is_embedding)
    module.weight = nn.Parameter(view.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if isinstance(module, nn.Embedding):
        module.num_embeddings = len(module.weight)
        # Of use in training alone, and it may be another rank's token.
        module.padding_idx = None
        return
    linear = cast(nn.Linear, module)
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None and part.outputs is not None:
        linear.bias = nn.Parameter(part.outputs.of(linear.bias.detach(), 0).clone(), requires_grad=False)
    elif linear.bias is not None and rank:
        # Added once to the sum.
        linear.bias = None


def _fit_groups(module: nn.Module) -> None:
    query, key, head_dim = (getattr(module, name, None) for name in (_QUERY, _KEY_VALUE[0], "head_dim"))
    if isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and hasattr(module, "num_key_value_groups"):
        assert isinstance(head_dim, int)
        module.num_key_value_groups = query.out_features // key.out_features  # type: ignore[assignment]
