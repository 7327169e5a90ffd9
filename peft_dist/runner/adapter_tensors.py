"""From an adapter's folder to checked weights, near the speed of reading the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError, UnfitAdapterError
from peft_dist.runner.adapter_check import TensorMap, map_tensors
from peft_dist.runner.adapter_config import LoraSettings, read_settings
from peft_dist.runner.adapter_hash import content_hash
from peft_dist.runner.adapter_modules import ModuleShape
from peft_dist.runner.adapter_weights import NotFiniteError, SafetensorsFile, WeightsFile, is_finite, open_weights
from peft_dist.runner.merged_ratio import ratio_to_weight


@dataclass(frozen=True, slots=True)
class ModuleWeights:
    """What one module gets: its output grows by ``scaling * B @ (A @ x)``.

    Attributes:
        A: ``[r, in_features]`` (an embedding: ``[r, num_embeddings]``), contiguous, as stored: float32, float16
            or bfloat16.
        B: ``[out_features, r]`` (an embedding: ``[embedding_dim, r]``), likewise.
        scaling: ``alpha / r`` or, with rank-stabilised LoRA, ``alpha / sqrt(r)``.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A checked adapter. Its tensors may be views of one buffer: do not write to them.

    Attributes:
        spec: Its identity. The content hash covers what the weights compute (module paths, ranks, scalings, types
            and bytes) and nothing else of the files, so one adapter saved twice hashes alike.
        weights: By module path in the base model, in sorted order.
    """

    spec: AdapterSpec
    weights: dict[str, ModuleWeights]


def load_adapter(
    name: str,
    path: Path,
    modules: Mapping[str, ModuleShape],
    *,
    allow_pickle: bool = False,
    pin_memory: bool = False,
) -> LoadedAdapter:
    """Read the PEFT LoRA adapter in ``path`` and check all of it against the base model.

    Args:
        name: What users call the adapter; no part of its content hash.
        path: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        modules: The base model (see ``describe_modules``).
        allow_pickle: Read ``adapter_model.bin`` where there is no safetensors file.
        pin_memory: Read into page-locked memory, from which a GPU copies while the host goes on.

    Raises:
        AdapterError: the adapter cannot be served; the message names it, what is wrong and the remedy.
    """
    try:
        settings = read_settings(path)
        with open_weights(path, allow_pickle) as file:
            found = map_tensors(file.shapes, modules, settings)
            weights = _read(file, found, modules, settings, pin_memory)
            digest = _hash(file, found, weights)
    except AdapterError as error:
        raise type(error)(f"adapter {name!r} in {path}: {error}") from error
    ranks = {module: w.rank for module, w in weights.items()}
    num_bytes = sum(w.A.nbytes + w.B.nbytes for w in weights.values())
    return LoadedAdapter(AdapterSpec(name, digest, str(path), ranks, num_bytes), weights)


def inspect_adapter(
    name: str, path: Path, modules: Mapping[str, ModuleShape], *, allow_pickle: bool = False
) -> AdapterSpec:
    """``load_adapter`` of which only the identity is kept: of the usual file a few MiB at a time are in memory.

    It tells ``merged_ratio`` too, which ``load_adapter`` leaves out.
    """
    try:
        settings = read_settings(path)
        with open_weights(path, allow_pickle) as file:
            if isinstance(file, SafetensorsFile) and file.is_of_one_type:
                found = map_tensors(file.shapes, modules, settings)
                if not found.copies:
                    spec = _scan(name, path, file, found, settings)
                    return msgspec.structs.replace(spec, merged_ratio=_ratio_in(file, found, modules, settings))
    except AdapterError as error:
        raise type(error)(f"adapter {name!r} in {path}: {error}") from error
    except NotFiniteError:
        # Read whole, the file tells in which tensor.
        pass
    adapter = load_adapter(name, path, modules, allow_pickle=allow_pickle)
    ratios = (_ratio(modules[module], w.A, w.B, w.scaling) for module, w in adapter.weights.items())
    return msgspec.structs.replace(adapter.spec, merged_ratio=max(ratios))


def _ratio_in(
    file: SafetensorsFile, found: TensorMap, modules: Mapping[str, ModuleShape], settings: LoraSettings
) -> float:
    """Reads the tensors again, two at a time, where they may be merged."""
    return max(
        _ratio(modules[path], file.read_one(pair.A), file.read_one(pair.B), settings.scaling(path))
        if modules[path].row_rms is not None
        else 0.0
        for path, pair in found.pairs.items()
    )


def _ratio(module: ModuleShape, A: torch.Tensor, B: torch.Tensor, scaling: float) -> float:
    if module.row_rms is None:
        return 0.0
    rows, columns = (A.T, B) if module.kind == "embedding" else (B, A.T)
    return ratio_to_weight(rows, columns, scaling, module.row_rms)


def _scan(name: str, path: Path, file: SafetensorsFile, found: TensorMap, settings: LoraSettings) -> AdapterSpec:
    rows = {}
    for module, pair in found.pairs.items():
        sizes = [math.prod(file.shapes[tensor]) * file.dtype(tensor).itemsize for tensor in (pair.A, pair.B)]
        dtypes = [str(file.dtype(tensor)) for tensor in (pair.A, pair.B)]
        rows[module] = (module, file.shapes[pair.A][0], settings.scaling(module).hex(), *dtypes, *sizes)
    digest = content_hash(msgspec.msgpack.encode(list(rows.values())), file.scan(_names(found)))
    ranks = {module: row[1] for module, row in rows.items()}
    return AdapterSpec(name, digest, str(path), ranks, sum(row[5] + row[6] for row in rows.values()))


def _read(
    file: WeightsFile,
    found: TensorMap,
    modules: Mapping[str, ModuleShape],
    settings: LoraSettings,
    pin_memory: bool,
) -> dict[str, ModuleWeights]:
    tensors = file.read(pin_memory)
    if not file.all_finite():
        bad = next(name for name, tensor in tensors.items() if not is_finite(tensor))
        raise UnfitAdapterError(
            f"tensor {bad} holds NaN or an infinity: the training diverged, use an earlier checkpoint"
        )
    for name, path in found.copies.items():
        _check_copy(name, tensors[name], modules[path])
    # A copied base weight can be many times the adapter: views would keep its memory.
    keep = torch.clone if found.copies else _as_is
    return {
        path: ModuleWeights(keep(tensors[pair.A]), keep(tensors[pair.B]), settings.scaling(path))
        for path, pair in found.pairs.items()
    }


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _check_copy(name: str, copy: torch.Tensor, module: ModuleShape) -> None:
    """PEFT saves targeted embeddings whole; a copy that equals the base changes nothing, any other is refused."""
    if module.part is not None:
        copy = module.part.of_weight(copy, turned=module.kind == "embedding")
    if module.weight is not None and _differs(copy, module.weight):
        raise UnfitAdapterError(
            f"tensor {name} is a base weight that differs from this base's (trained, resized or of another "
            "model): merge the adapter with PEFT's merge_and_unload and serve that model"
        )


def _differs(copy: torch.Tensor, read_base: Callable[[], torch.Tensor]) -> bool:
    base = read_base()
    if _same_weight(copy, base):
        return False
    # An adapter may have been merged into it while it was read: the base's bits are somewhere else then.
    again = read_base()
    return again is base or not _same_weight(copy, again)


def _same_weight(copy: torch.Tensor, base: torch.Tensor) -> bool:
    """Equality of one weight held in two types, up to one rounding to the coarser of them."""
    base = base.detach().cpu()
    if copy.dtype == base.dtype:
        return bool(torch.equal(copy, base))
    coarse = max(torch.finfo(copy.dtype).eps, torch.finfo(base.dtype).eps)
    return bool(torch.allclose(copy.float(), base.float(), rtol=coarse, atol=2.0**-24))


def _hash(file: WeightsFile, found: TensorMap, weights: Mapping[str, ModuleWeights]) -> str:
    description = [
        (path, w.rank, w.scaling.hex(), str(w.A.dtype), str(w.B.dtype), w.A.nbytes, w.B.nbytes)
        for path, w in weights.items()
    ]
    return content_hash(msgspec.msgpack.encode(description), file.stream(_names(found)))


def _names(found: TensorMap) -> Iterator[str]:
    """In the order in which they are hashed."""
    return (name for pair in found.pairs.values() for name in (pair.A, pair.B))
