"""How large an adapter is against the base, and from what size on its merged weights serve nobody else.

Rows of others that run over merged weights get the merged part taken away again. Of the base's digits they keep those
that it left: where a row of the weight, as it stands, rounds to eps * |W|, the merged one rounds to
eps * (|W| + |s * B @ A|).
"""

from __future__ import annotations

import math

import torch

# Rounding that other rows may be left with, over the type's own: three bits, less than lies between two half-precision
# types. docs/kernels.md has what it measures to.
ROUNDING_GROWTH = 8.0
# Share of the logits' scale below which two answers are one (docs/architecture.md, "Identical").
IDENTICAL = 2e-5
PIECE_ROWS = 64
# What stays in a cache, as float32.
_PIECE_ELEMENTS = 1 << 16
# Within these float32 loses nothing that counts of a square.
_LEAST_NORM, _MOST_NORM = 1e-12, 1e12


def host_limit(dtype: torch.dtype) -> float:
    """Largest ratio (``ratio_to_weight``) of an adapter whose merged batches others may join, in weights of ``dtype``.

    The rounding may grow to ``ROUNDING_GROWTH`` times what it is, or up to where it would first be seen: it happens
    twice, when the part is added and when it is taken away.
    """
    return max(ROUNDING_GROWTH, IDENTICAL / (2.0 * torch.finfo(dtype).eps)) - 1.0


def row_rms(weight: torch.Tensor, num_outputs: int) -> float:
    """Root of the mean square norm of what a matrix, of any type and on any device, has for each output."""
    # Piece by piece: a CPU converts faster than it reads another type, and the copies must not grow with the weight.
    pieces = [
        torch.linalg.vector_norm(rows.float(), dim=1).double().square().sum()
        for rows in weight.detach().split(PIECE_ROWS)
    ]
    return math.sqrt(float(torch.stack(pieces).sum()) / num_outputs)


def ratio_to_weight(rows: torch.Tensor, columns: torch.Tensor, scaling: float, row_rms: float) -> float:
    """The largest row of ``scaling * rows @ columns.T``, against a weight's mean row. Infinite where it is not known.

    It is the norm of the row, or what it would be were its ranks orthogonal if that is more: parts that cancel are
    rounded by their size. Where a cruder bound is within every type's limit already, the result is that bound.

    Args:
        rows: ``[outputs, r]``, PEFT's B (of an embedding: ``[num_embeddings, r]``, A transposed). Finite.
        columns: ``[inputs, r]``, A transposed (of an embedding: ``[embedding_dim, r]``, B). Finite.
        row_rms: Of the weight: of each output's row, or each token's.
    """
    bound = _quick_bound(rows, columns, abs(scaling), row_rms)
    if bound is not None and bound <= ROUNDING_GROWTH - 1.0:
        return bound
    # Each rank by itself is brought to the order of one, so that no square over- or underflows.
    rows, row_sizes = _unit(rows)
    columns, column_sizes = _unit(columns)
    sizes = row_sizes * column_sizes
    largest = float(sizes.max())
    rows = rows * (sizes / max(largest, 1e-300)).float()
    unit = abs(scaling) * largest

    def ratio(norm: float) -> float:
        size = unit * norm
        if not size:
            return 0.0
        found = size / row_rms if row_rms else math.inf
        return found if math.isfinite(found) else math.inf

    bound = ratio(_largest_sum(rows, torch.linalg.vector_norm(columns, dim=0)))
    if bound <= ROUNDING_GROWTH - 1.0:
        return bound
    products = columns.T @ columns
    exact = ((rows @ products) * rows).sum(1).max()
    orthogonal = (rows.square() @ products.diagonal()).max()
    return ratio(float(torch.maximum(exact, orthogonal).sqrt()))


def _quick_bound(rows: torch.Tensor, columns: torch.Tensor, scaling: float, row_rms: float) -> float | None:
    """The cruder bound of the numbers as they stand, in a pass over each; None where float32 may be too narrow."""
    norms = torch.linalg.vector_norm(columns, dim=0, dtype=torch.float32)
    least, most = (float(norm) for norm in norms.aminmax())
    # What underflows by the rows is less than 1e-37, so the factor must not make anything of it.
    if not (least >= _LEAST_NORM and most <= _MOST_NORM and row_rms > 0.0 and scaling <= row_rms * 1e12):
        return None
    return scaling * _largest_sum(rows, norms) / row_rms


def _largest_sum(rows: torch.Tensor, weights: torch.Tensor) -> float:
    """The largest of a matrix's rows, as the sum of its absolute elements by their columns' weights (float32)."""
    pieces = rows.split(max(1, _PIECE_ELEMENTS // rows.shape[1]))
    return max(float((piece.float().abs() @ weights).max()) for piece in pieces)


def _unit(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns divided by their largest elements: float32 ``[n, r]``; and these: float64 ``[r]``."""
    sizes = matrix.abs().amax(0).float()
    return matrix.float() / sizes.where(sizes > 0, 1.0), sizes.double()
