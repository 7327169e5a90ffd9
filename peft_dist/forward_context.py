"""The tensors of one forward pass, reachable from patched layers that Hugging Face calls without them.

Entered with ``with``, never nested; each thread has its own. Outside of a context every patched layer runs
the code it replaced.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from peft_dist.kernels.few_rows import FewRows
    from peft_dist.kernels.lora_parts_beside import PartsBeside
    from peft_dist.kernels.products import Products
    from peft_dist.kernels.types import AttentionMetadata, KVCache, LoRALayerWeights, LoRAPlan
    from peft_dist.patches.merged_layers import MergedLayers

_current: contextvars.ContextVar[ForwardContext | None] = contextvars.ContextVar("peft_dist_forward", default=None)


@dataclass(slots=True)
class ForwardContext:
    """What patched layers need of one packed forward ``[1, T]`` (or one padded forward of the drop-in).

    Attributes:
        attention: Where each sequence's tokens and KV blocks are; None leaves attention to Hugging Face.
        kv_caches: Paged (key, value) caches by the attention module's ``layer_idx``.
        lora: Which rows of a layer's input belong to which adapter slot; None when no row has an adapter.
        lora_logits: The same for the rows that reach ``lm_head`` (only sampled positions do).
        lora_weights: Stacked adapter weights by the patched layer's ``lora_index``; None where the layer
            has no resident adapter.
        merged: Weights with an adapter folded in, which all rows are multiplied with instead of the base's; None
            takes the modules' own weights, whatever is in them.
        lora_correction, lora_logits_correction: Second plans, added like ``lora`` and ``lora_logits``: under merged
            weights they take the merged adapter's part away from the rows that it does not belong to (factor -1).
        token_rows: int64 ``[T]``, the rows of a padded batch flattened to ``[B * S]`` that hold tokens, for
            attention; None when every row does (always, in a packed forward).
        windowed: Layers whose attention must bring its sliding window, where that was not checked before.
        few_rows: For products of few rows, where it knows a faster way; None leaves them to torch.
        parts_beside: Computes adapters' parts beside the products, for kernels that add them later; None: they are
            added at once.
        products: Which way a product takes, where that is known; None: as is usual.
        takes_part: Whoever gets the next layer's output adds a part to it: the layer may ``hand_part`` it.
        shared: Outputs that ``shared_output`` computed and nobody has taken yet.
    """

    attention: AttentionMetadata | None = None
    kv_caches: Sequence[KVCache] | Mapping[int, KVCache] = ()
    lora: LoRAPlan | None = None
    lora_logits: LoRAPlan | None = None
    lora_weights: Sequence[LoRALayerWeights | None] = ()
    merged: MergedLayers | None = None
    lora_correction: LoRAPlan | None = None
    lora_logits_correction: LoRAPlan | None = None
    token_rows: torch.Tensor | None = None
    windowed: Collection[int] = ()
    few_rows: FewRows | None = None
    parts_beside: PartsBeside | None = None
    products: Products | None = None
    takes_part: bool = False
    shared: dict[object, tuple[torch.Tensor, list[torch.Tensor | None]]] = field(default_factory=dict)
    _handed: tuple[torch.Tensor, torch.Tensor] | None = None
    _token: contextvars.Token[ForwardContext | None] | None = None

    def lora_plans(self, is_output: bool) -> list[LoRAPlan]:
        """What is added to a layer's output; ``is_output``: the layer sees the rows that reach ``lm_head``."""
        if is_output:
            plans = (self.lora_logits, self.lora_logits_correction)
        else:
            plans = (self.lora, self.lora_correction)
        return [plan for plan in plans if plan is not None]

    def shared_output(
        self,
        group: object,
        index: int,
        x: torch.Tensor,
        compute: Callable[[torch.Tensor], Sequence[torch.Tensor | None]],
    ) -> torch.Tensor:
        """Output ``index`` of a group of layers that are called one after another with one and the same tensor.

        The first of them computes the outputs of all, the others take theirs. A member that is called with another
        tensor, or again, computes anew, so that a group that is called otherwise than expected is only slower. None
        from ``compute`` is for members that do not ask here this time.
        """
        held = self.shared.get(group)
        if held is None or held[0] is not x or held[1][index] is None:
            held = self.shared[group] = (x, list(compute(x)))
        outputs = held[1]
        output = outputs[index]
        assert output is not None
        outputs[index] = None
        if not any(left is not None for left in outputs):
            del self.shared[group]
        return output

    def hand_over(self, group: object, x: torch.Tensor, output: torch.Tensor) -> None:
        """Give a layer that is called next what it will compute of x: it takes it by ``shared_output``."""
        self.shared[group] = (x, [output])

    def hand_part(self, output: torch.Tensor, part: torch.Tensor) -> None:
        """Leave what is still to be added to an output to whoever gets it."""
        self._handed = (output, part)

    def take_part(self, output: torch.Tensor) -> torch.Tensor | None:
        """What is still to be added to an output; None: nothing is.

        Raises:
            RuntimeError: a part was left of another tensor.
        """
        handed, self._handed, self.takes_part = self._handed, None, False
        if handed is None:
            return None
        if handed[0] is not output:
            raise RuntimeError("a module changed an output before its adapters' part was added: run with --no-fuse")
        return handed[1]

    def __enter__(self) -> ForwardContext:
        if _current.get() is not None:
            raise RuntimeError("a ForwardContext is already entered in this thread: model calls do not nest")
        self._token = _current.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._token is not None
        _current.reset(self._token)
        self._token = None


def current() -> ForwardContext | None:
    """The context of the forward pass running in this thread, or None outside of one."""
    return _current.get()
