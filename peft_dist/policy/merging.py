"""What merging makes of a replica's speed: how long requests take by whose they are, without a look at the queue."""

from __future__ import annotations

import math
from functools import lru_cache


def merged_share(share: float, ratio: float) -> float:
    """The part of the time for which running merged makes the mean of all seconds per token least.

    Args:
        share: Of the requests, those of the adapter that has most.
        ratio: Seconds of a merged step, alone, over those of an unmerged one of all.

    While merged for a part f, requests of the adapter take 1 / (1 + g f) of their time, g = 1 / ratio - 1, and those of
    others 1 / (1 - f). ``settlement.interruption_price`` has credits lead there.
    """
    if share >= 1.0:
        return 1.0 if ratio < 1.0 else 0.0
    if share <= ratio or ratio >= 1.0:
        return 0.0
    gain = 1.0 / ratio - 1.0
    rest = math.sqrt((1.0 - share) / (gain * share))
    return max(0.0, (1.0 - rest) / (1.0 + gain * rest))


@lru_cache(maxsize=1 << 14)
def slowdown(leading: int, total: int, seats: int, ratio: float) -> float:
    """Mean seconds per token of a replica's requests, as a part of what they take unmerged: between ``ratio`` and 1.

    Beyond the ``seats`` requests of the adapter that leads fill whole merged steps while others wait, as far as these
    do not fill steps of their own.
    """
    if not total or not leading or ratio >= 1.0:
        return 1.0
    if leading >= total:
        return ratio
    share, part = leading / total, merged_share(leading / total, ratio)
    mean = share / (1.0 + (1.0 / ratio - 1.0) * part) + (1.0 - share) / (1.0 - part)
    if total > seats:
        others = total - leading
        mean = min(mean, (max(seats, others) + ratio * max(0, leading - max(0, seats - others))) / total)
    return min(mean, 1.0)


@lru_cache(maxsize=1 << 14)
def own_slowdown(leading: int, total: int, ratio: float, *, leads: bool) -> float:
    """The same of one request: of the adapter that leads, or of another, which waits while that one is merged."""
    part = merged_share(leading / total, ratio) if total else 0.0
    if leads:
        return 1.0 / (1.0 + (1.0 / ratio - 1.0) * part) if ratio < 1.0 else 1.0
    return 1.0 / (1.0 - part) if part < 1.0 else 1.0
