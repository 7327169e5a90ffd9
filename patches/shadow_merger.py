"""Merging into a second set of weights: the base's are never written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.kernels.merge import MergeItem, merge_group_
from peft_dist.kernels.pinned import pinned_bytes
from peft_dist.kernels.pooled_adapter import PooledAdapter
from peft_dist.patches.joined_linear import Joint, joint_of
from peft_dist.patches.lora_layers import SelectiveEmbedding, SelectiveLinear
from peft_dist.patches.merged_layers import MergedLayers, twin_of
from peft_dist.patches.merging import Merger, weight_of
from peft_dist.patches.packed_linear import Packing, pack_weight, packing_of
from peft_dist.patches.pooled_merge import PooledMerge


class ShadowMerger(Merger):
    """Merged weights beside the base's; which of them a pass reads is a flag, so that unmerging costs nothing.

    Layers that oneDNN packed get a packed copy of the merged weight; the layers that are packed as one with them
    are in it. All others get a plain copy at an address that stays; those of joined layers lie in one buffer as well.
    On a GPU every known layer's copy is part of ``layers``, with the base's weight where the merged adapter has none:
    a captured CUDA graph serves every adapter.
    """

    way = "shadow"
    on_device = True

    def __init__(self, model: nn.Module, paths: Iterable[str] = ()) -> None:
        super().__init__(model, paths)
        self._layers = MergedLayers()
        self._twins: dict[nn.Module, nn.Module] = {}
        # What the twins of joined layers are views of.
        self._buffers: dict[Joint, torch.Tensor] = {}
        # Twins that the merged pass reads.
        self._covered: dict[nn.Module, nn.Module] = {}
        # Twins that hold something else than their base's weight.
        self._dirty: set[nn.Module] = set()
        self._scratch = torch.empty(0)
        self._holds_adapter = False
        self._pooled = PooledMerge(model, self._sites)

    @property
    def layers(self) -> MergedLayers | None:
        return self._layers if self.is_merged else None

    def bytes_with(self, paths: Iterable[str]) -> int:
        """The copies, and room for the largest of the weights that have to be packed."""
        modules = dict(self._modules) | dict.fromkeys(self._site(path) for path in paths)
        packings = {packing for module in modules if (packing := packing_of(module))}
        packed = [sum(weight_of(layer).nbytes for layer in packing.layers) for packing in packings]
        plain = sum(weight_of(module).nbytes for module in _with_joined(modules) if packing_of(module) is None)
        return sum(packed) + max(packed, default=0) + plain

    def allocate(self) -> None:
        # Packed weights are made by the merge: their library returns new memory each time.
        with torch.inference_mode(False), torch.no_grad():
            for module in _with_joined(self._modules):
                if packing_of(module) is None and module not in self._twins:
                    self._make_twins(module)

    def _make_twins(self, module: nn.Module) -> None:
        """Of a module, and of those that it is joined with."""
        joint = joint_of(module)
        if joint is None:
            twins = {module: torch.empty_like(weight_of(module))}
        else:
            buffer = weight_of(module).new_empty(sum(joint.sizes), joint.layers[0].in_features)
            self._buffers[joint] = buffer
            twins = dict(zip(joint.layers, buffer.split(joint.sizes), strict=True))
        self._twins.update((layer, twin_of(layer, weight)) for layer, weight in twins.items())
        self._dirty.update(twins)

    def merge(self, adapter: Mapping[str, LayerTensors]) -> None:
        tensors = self._checked(adapter)
        for path in adapter:
            if not isinstance(self._model.get_submodule(path), (SelectiveLinear, SelectiveEmbedding)):
                raise ValueError(f"{path} has no LoRA layer around it, so that no pass would read the merged weight")
        self.is_merged = self._holds_adapter = False
        self._modules.update(dict.fromkeys(tensors))
        self.allocate()
        # Ordinary tensors whatever mode the caller is in: the next merge may come in another.
        with torch.inference_mode(False), torch.no_grad():
            self._merge_plain({m: t for m, t in tensors.items() if packing_of(m) is None})
            self._merge_packed({m: t for m, t in tensors.items() if packing_of(m) is not None})
        self.is_merged = self._holds_adapter = True

    def merge_pooled(self, adapter: PooledAdapter) -> bool:
        """In a launch for each shape, with the base's weight in the twins that another adapter was merged into."""
        modules = self._pooled.modules(adapter)
        if modules is None or not modules <= self._twins.keys():
            return False
        stale = self._dirty - modules
        written = modules | self._pooled.pooled(stale) if stale else modules
        table = self._pooled.table(adapter, written, self._twins)
        if table is None:
            return False
        self.is_merged = self._holds_adapter = False
        with torch.inference_mode(False), torch.no_grad():
            self._layers.packed.clear()
            self._dirty |= modules
            self._restore(stale - written)
            table.merge(adapter.slot, max(adapter.ranks.values(), default=0))
            self._dirty -= stale
            if len(self._covered) != len(self._twins):
                self._show(self._twins)
        self.is_merged = self._holds_adapter = True
        return True

    def unmerge(self) -> None:
        self.is_merged = False

    def ready_layers(self) -> MergedLayers:
        """What passes will read when an adapter is merged, with the base's weights: to capture CUDA graphs with."""
        if not self._holds_adapter:
            with torch.inference_mode(False), torch.no_grad():
                self._cover({})
        return self._layers

    def resume(self) -> bool:
        self.is_merged = self._holds_adapter
        return self.is_merged

    @property
    def copy_bytes(self) -> int:
        """What ``copy_out`` takes now."""
        packed = sum(tensor.nbytes for tensor in self._layers.packed.values())
        return packed + sum(_host_bytes(weight_of(twin)) for twin in self._covered.values())

    def copy_out(self) -> MergedLayers:
        """A copy of the merged weights in host memory, pinned where they are on a GPU, for ``copy_in``.

        Layer by layer, joined ones too. A GPU copies them in order with what runs on its current stream: nobody but
        ``copy_in`` may read them.
        """
        with torch.inference_mode(False), torch.no_grad():
            host = {module: twin_of(module, _to_host(weight_of(twin))) for module, twin in self._covered.items()}
            return MergedLayers(host, {packing: t.clone() for packing, t in self._layers.packed.items()})

    def copy_in(self, weights: MergedLayers) -> None:
        """Merge what ``copy_out`` took, by copying; the twins keep their addresses."""
        self.is_merged = self._holds_adapter = False
        self._modules.update(dict.fromkeys(weights.twins))
        self.allocate()
        with torch.inference_mode(False), torch.no_grad():
            self._cover(weights.twins)
            for module, twin in weights.twins.items():
                weight_of(self._twins[module]).copy_(weight_of(twin), non_blocking=True)
            self._layers.packed.clear()
            self._layers.packed.update((packing, tensor.clone()) for packing, tensor in weights.packed.items())
        self.is_merged = self._holds_adapter = True

    def _merge_plain(self, tensors: Mapping[nn.Module, LayerTensors]) -> None:
        self._cover(tensors)
        merge_group_([MergeItem(weight_of(self._twins[m]), weight_of(m), *t) for m, t in tensors.items()])

    def _cover(self, written: Mapping[nn.Module, object]) -> None:
        """Choose the twins of ``layers``: those about to be written, and on a GPU all others, as the base has them."""
        merged = _with_joined(m for m in self._twins if m in written or weight_of(m).is_cuda)
        self._restore(self._dirty.intersection(merged).difference(written))
        self._dirty.update(written)
        self._show(merged)

    def _restore(self, modules: Collection[nn.Module]) -> None:
        """Bring the base's weights into these twins."""
        if modules:
            torch._foreach_copy_([weight_of(self._twins[m]) for m in modules], [weight_of(m) for m in modules])
            self._dirty.difference_update(modules)

    def _show(self, merged: Iterable[nn.Module]) -> None:
        """Let the merged pass read these twins; those that are joined all or none."""
        self._covered = {module: self._twins[module] for module in merged}
        self._layers.twins.clear()
        self._layers.twins.update((m, twin) for m, twin in self._covered.items() if joint_of(m) is None)
        self._layers.joined.clear()
        self._layers.joined.update((joint, self._buffers[joint]) for m in merged if (joint := joint_of(m)))

    def _merge_packed(self, tensors: Mapping[nn.Module, LayerTensors]) -> None:
        packings = {packing: None for module in tensors if (packing := packing_of(module))}
        for packing in self._layers.packed.keys() - packings.keys():
            del self._layers.packed[packing]
        for packing in packings:
            self._layers.packed[packing] = pack_weight(self._joined(packing, tensors))

    def _joined(self, packing: Packing, tensors: Mapping[nn.Module, LayerTensors]) -> torch.Tensor:
        """The weights of layers packed as one, below one another, merged where the adapter has a part."""
        weights = [weight_of(layer) for layer in packing.layers]
        rows, columns, like = sum(packing.sizes), weights[0].shape[1], weights[0]
        if self._scratch.dtype != like.dtype or self._scratch.numel() < rows * columns:
            self._scratch = like.new_empty(rows * columns)
        joined = self._scratch[: rows * columns].view(rows, columns)
        parts = joined.split(packing.sizes)
        for layer, weight, part in zip(packing.layers, weights, parts, strict=True):
            if layer not in tensors:
                part.copy_(weight)
        items = zip(packing.layers, parts, weights, strict=True)
        merge_group_([MergeItem(part, weight, *tensors[layer]) for layer, part, weight in items if layer in tensors])
        return joined


def _with_joined(modules: Iterable[nn.Module]) -> dict[nn.Module, None]:
    """These modules and those that they are joined with, each once, in order."""
    found: dict[nn.Module, None] = {}
    for module in modules:
        joint = joint_of(module)
        found.update(dict.fromkeys(joint.layers if joint else [module]))
    return found


def _to_host(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda).copy_(weight, non_blocking=True)


def _host_bytes(weight: torch.Tensor) -> int:
    return pinned_bytes(weight.nbytes) if weight.is_cuda else weight.nbytes
