"""Adapters' parts computed whole beside the layers' own products, for kernels that add them where they read both.

In a step of some dozens to some hundreds of rows the products wait for weights, and what comes before or behind them is
time in which no weight is on its way. So shrink and expand run on a stream of their own, for which the products leave
some multiprocessors alone, and nothing of the adapters is left behind a product but one more tensor for the norm,
activation or rotation that follows anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peft_dist.kernels.spared import spare_multiprocessors
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

Multiply = Callable[[], Sequence[torch.Tensor]]
"""The layers' own outputs, queued on the current stream."""

# Beyond these a product is short of arithmetic, which spared multiprocessors take from it.
MOST_ROWS = 256
# Of the 132 of an H100, for the bytes of 32 adapters of rank 16 to come as fast as those of the weights.
SPARED = 32


class PartsBeside:
    """The parts of layers that read one x, in captured steps.

    Args:
        most_rows: Of the steps that it takes where nothing was measured (``Products``).
        spared: Multiprocessors that the products leave alone there.

    Attributes:
        stream: Of the parts; None on a CPU.
    """

    def __init__(self, device: torch.device | str, most_rows: int = MOST_ROWS, spared: int = SPARED) -> None:
        # Of the lowest priority there is: a product that comes last starts when the last of these programs ends.
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._most_rows, self._spared = most_rows, spared

    def takes(self, x: torch.Tensor, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan) -> bool:
        """Whether ``compute`` is to take layers that read x, where nothing was measured: ``fits``, and few rows."""
        return plan.num_rows <= self._most_rows and self.fits(x, weights, plan)

    def fits(self, x: torch.Tensor, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan) -> bool:
        """Whether ``compute`` can take layers that read x: every one adapted, in one launch each."""
        if plan.backend != "triton" or None in weights:
            return False
        from peft_dist.kernels import lora_triton

        resident = [w for w in weights if w is not None]
        return (plan.tiles is None or plan.tiles.has_base) and lora_triton.is_one_launch(x, resident)

    def compute(
        self,
        x: torch.Tensor,
        weights: Sequence[LoRALayerWeights | None],
        plan: LoRAPlan,
        multiply: Multiply,
        spared: int | None = None,
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """(outputs without the parts, parts): each ``[..., out_features]`` of a layer, in x's dtype.

        Args:
            x: ``[..., in_features]``, R rows, for which ``fits`` holds.
            multiply: Computes the outputs.
            spared: As measured for this size; None: as for all.

        The parts are columns of one tensor; 0 in rows of the base, anything in rows of no tile (padding).
        """
        from peft_dist.kernels import lora_triton

        widths = [w.B.shape[1] for w in weights if w is not None]
        parts = x.new_empty(*x.shape[:-1], sum(widths)).split(widths, dim=-1)
        if self.stream is None:
            lora_triton.lora_shrink_group(x, weights, plan)
            lora_triton.lora_expand_group_(parts, weights, plan, adds=False)
            return multiply(), parts
        current = torch.cuda.current_stream()
        # Not waited for until the outputs are queued: a fork that an error leaves unjoined would break a capture.
        begun = current.record_event()
        with spare_multiprocessors(self._spared if spared is None else spared):
            outputs = multiply()
        self.stream.wait_event(begun)
        with torch.cuda.stream(self.stream):
            lora_triton.lora_shrink_group(x, weights, plan)
            lora_triton.lora_expand_group_(parts, weights, plan, adds=False)
        current.wait_stream(self.stream)
        return outputs, parts
