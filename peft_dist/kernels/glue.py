"""What stands between a model's matrix multiplications, each in one pass over memory: norms, gates, rotary embedding.

Each function exists as a Triton kernel (``glue_triton``) and as its plain twin (``reference_glue``); the module that
``implementation`` returns has them all. Nothing here has gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Literal, NamedTuple, Protocol, cast

import torch

from peft_dist.kernels.types import KVCache

Activation = Literal["silu", "gelu_tanh"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """A root mean square norm: ``x / sqrt(mean(x ** 2) + eps)`` times its weight, in float32.

    Attributes:
        weight: ``[columns]``.
        eps: Added to the mean of the squares.
        adds_one: The factor is ``1 + weight`` (Gemma).
        rounds: The normalised row is rounded to its dtype before it is multiplied with the weight (Llama).
    """

    weight: torch.Tensor
    eps: float
    adds_one: bool = False
    rounds: bool = True


class Glue(Protocol):
    """The functions of an implementation. Tensors have unit stride in their last dimension, and any other strides."""

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Norm of each row of ``[rows, columns]``, contiguous, in x's dtype."""

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: Norm, part: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm, sum): the sum of two ``[rows, columns]``, rounded to their dtype, and the norm of that.

        ``part``: A third one, of what is still to be added to x.
        """

    def gated(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        activation: Activation,
        parts: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``activation(gate) * up`` of two ``[rows, columns]``, rounded once.

        ``parts``: Two more, columns of one tensor, of what is still to be added to each.
        """

    def rotary_and_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: KVCache,
        slot_mapping: torch.Tensor,
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
        parts: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Rotary embedding of queries and keys, and this step's keys and values into the paged cache.

        Args:
            query: ``[T, num_heads, head_dim]``.
            key: ``[T, num_kv_heads, head_dim]``.
            value: ``[T, num_kv_heads, head dim of the values]``.
            cos, sin: ``[T, rotary_dim]``, rotary_dim even and at most head_dim. Element i of a head turns with element
                ``i + rotary_dim / 2`` (Llama's layout of halves); those from rotary_dim on stay.
            cache: Of the layer, ``[num_blocks, block_size, num_kv_heads, head_dim]`` each.
            slot_mapping: int64 ``[T]``, ``block * block_size + offset``; a negative one writes nothing.
            query_norm, key_norm: Of each head, before the rotation, without rounding in between; both or none.
            parts: Of query, key and value each what is still to be added to it, in its shape, columns of one tensor.

        Returns:
            The rotated queries, ``[T, num_heads, head_dim]``, contiguous.
        """


@cache
def implementation(name: str) -> Glue:
    """ "triton" or "reference"."""
    module = {"triton": "glue_triton", "reference": "reference_glue"}[name]
    return cast(Glue, import_module(f"peft_dist.kernels.{module}"))
