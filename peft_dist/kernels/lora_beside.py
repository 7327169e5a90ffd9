"""The adapters' first product beside the layer's own: neither needs the other, and each leaves room on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan


class ShrinkBeside:
    """Rank intermediates on their way, on a stream of their own.

    In a captured step this makes a fork and a join in the graph; the join comes before the tensors that the shrink
    reads can be given to anybody else.
    """

    def __init__(self, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan, stream: torch.cuda.Stream) -> None:
        self._weights, self._plan, self._stream = weights, plan, stream

    @classmethod
    def begin(cls, x: torch.Tensor, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan) -> ShrinkBeside | None:
        """Queue the shrink; None where it is not worth a second stream, or not one launch: nothing was done then."""
        from peft_dist.kernels import lora_triton

        resident = [w for w in weights if w is not None]
        workspace = resident[0].workspace if resident else None
        if workspace is None or workspace.stream is None or not lora_triton.is_one_launch(x, resident):
            return None
        stream = workspace.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            lora_triton.lora_shrink_group(x, weights, plan)
        return cls(weights, plan, stream)

    def finish_(self, ys: Sequence[torch.Tensor]) -> None:
        """Add the adapters' parts to the layers' outputs, which the current stream has computed meanwhile."""
        from peft_dist.kernels import lora_triton

        torch.cuda.current_stream().wait_stream(self._stream)
        lora_triton.lora_expand_group_(ys, self._weights, self._plan)

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        """The same for two layers whose outputs are only used as ``activation(gate) * up``, which is returned."""
        from peft_dist.kernels import lora_gate_triton

        torch.cuda.current_stream().wait_stream(self._stream)
        return lora_gate_triton.lora_expand_gate(gate, up, self._weights, self._plan, activation)
