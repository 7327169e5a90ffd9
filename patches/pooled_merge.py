"""The layers of resident adapters as the kernel that merges from the LoRA pool knows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from peft_dist.kernels.pooled_adapter import PooledAdapter, PooledItem, can_merge_from_pool
from peft_dist.patches.lora_layers import SelectiveEmbedding, SelectiveLinear
from peft_dist.patches.merge_sites import MergeSites, is_turned
from peft_dist.patches.merging import weight_of
from peft_dist.patches.packed_linear import packing_of

if TYPE_CHECKING:
    from peft_dist.kernels.merge_pool_triton import MergeTable

# Sets of layers whose addresses are kept: adapters of one server target few.
_MOST_TABLES = 8


class _Table(NamedTuple):
    modules: tuple[nn.Module, ...]
    where: tuple[object, ...]
    table: MergeTable


class PooledMerge:
    """What a merge from the pool needs to know of its layers, made once for each set of them.

    While a merge is being launched the device waits for the host: of each layer nothing is looked at anew but the
    address of its weight.
    """

    def __init__(self, model: nn.Module, sites: MergeSites) -> None:
        self._model = model
        self._sites = sites
        self._num_known = 0
        # Base layers by ``lora_index``, and the other way round.
        self._modules: dict[int, nn.Module] = {}
        self._indices: dict[nn.Module, int] = {}
        self._tables: dict[frozenset[nn.Module], _Table] = {}

    def modules(self, adapter: PooledAdapter) -> frozenset[nn.Module] | None:
        """Base layers that an adapter changes; None where one of them cannot be merged from the pool."""
        self._learn(adapter)
        ranks = adapter.ranks
        if not ranks.keys() <= self._modules.keys():
            return None
        return frozenset(map(self._modules.__getitem__, ranks))

    def pooled(self, modules: Iterable[nn.Module]) -> frozenset[nn.Module]:
        """Of these base layers those that the pool has."""
        return frozenset(module for module in modules if module in self._indices)

    def table(
        self, adapter: PooledAdapter, modules: frozenset[nn.Module], twins: Mapping[nn.Module, nn.Module]
    ) -> MergeTable | None:
        """For these layers, from the base's weights into their twins'; None where the kernel cannot do one of them."""
        held = self._tables.get(modules)
        order = tuple(modules) if held is None else held.modules
        where = (adapter.pool, adapter.pool.layout[0], *[weight_of(module).data_ptr() for module in order])
        if held is not None and held.where == where:
            return held.table
        items = [self._item(adapter, module, twins[module]) for module in order]
        if any(item.reason_against for item in items):
            return None
        from peft_dist.kernels.merge_pool_triton import MergeTable

        if len(self._tables) >= _MOST_TABLES:
            self._tables.clear()
        self._tables[modules] = _Table(order, where, MergeTable(items))
        return self._tables[modules].table

    def _item(self, adapter: PooledAdapter, module: nn.Module, twin: nn.Module) -> PooledItem:
        layer = adapter.pool.addressed_weights[self._indices[module]]
        return PooledItem(weight_of(twin), weight_of(module), layer, is_turned(module))

    def _learn(self, adapter: PooledAdapter) -> None:
        """Which base layers the pool's layers stand for. It gets more when an adapter targets others, never fewer."""
        if len(adapter.paths) == self._num_known:
            return
        self._num_known = len(adapter.paths)
        for index, path in adapter.paths.items():
            module, layer = self._sites.modules.get(path), self._model.get_submodule(path)
            if module is None or packing_of(module) or not isinstance(layer, (SelectiveLinear, SelectiveEmbedding)):
                continue
            if can_merge_from_pool(weight_of(module).device):
                self._modules[index], self._indices[module] = module, index
