"""What FlashAttention computes over a paged cache, in plain torch: the stand-ins of its builds call it."""

from __future__ import annotations

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal, aligned to the last query; ``window`` is (keys seen to the left, to the right), -1 for all."""
    assert starts.dtype == lengths.dtype == blocks.dtype == torch.int32
    out = torch.zeros(len(q), q.shape[1], v.shape[3], dtype=q.dtype)
    group = q.shape[1] // k.shape[2]
    for s, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[s]), int(starts[s + 1]))
        pages = blocks[s, : -(-length // k.shape[1])].long()
        keys, values = (t[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        n = scores.shape[1]
        distance = torch.arange(length - n, length)[:, None] - torch.arange(length)[None]
        hidden = distance < 0
        if window[0] >= 0:
            hidden |= distance > window[0]
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            column = sinks.float()[:, None, None].expand(-1, n, 1)
            weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
