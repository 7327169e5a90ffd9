"""What the authors' notebooks hold: the outputs saved in the public artifact of dLoRA (OSDI'24).

Of Figure 9 that is the panel of MAF1 and 7b alone; the other five are empty there.
"""

from __future__ import annotations

import itertools

# Seconds a token (mean) by requests a second: MAF1, 7b, 32 replicas, 128 adapters.
FIGURE9: dict[str, dict[float, float]] = {
    "vllm": {2: 0.03, 4: 0.11, 6: 0.25, 8: 0.56, 12: 1.16},
    "peft": {1: 0.03, 2: 0.11, 4: 0.30, 6: 0.59, 8: 1.18},
    "dlora": {8: 0.03, 16: 0.04, 24: 0.04, 32: 0.05, 40: 0.06, 48: 0.09, 56: 0.37, 64: 0.55, 72: 0.82, 80: 1.85},
}
# Per cent of a request's time that it queues, by replica.
FIGURE2: dict[float, float] = dict(enumerate((54.1, 31.4, 76.3, 87.1, 10.9, 69.8, 86.0, 31.3)))
# Microseconds; batches of 2 to 16 lie within these ranges.
FIGURE5 = {"Wx": (91.4, 92.3), "BAx": (35.3, 36.9)}
# Calls in the busiest and in the quietest bin of 40 minutes.
FIGURE7 = (31.64e6, 21.57e6)
# Seconds a token by stride.
FIGURE10: dict[str, dict[str, dict[float, float]]] = {
    "avg_lat": {
        "fcfs": {4: 1.25, 8: 1.34, 16: 1.35, 32: 1.43},
        "merge": {4: 2.28, 8: 1.53, 16: 1.12, 32: 1.06},
        "credit": {4: 0.58, 8: 0.68, 16: 0.72, 32: 0.60},
    },
    "p90_lat": {
        "fcfs": {4: 3.02, 8: 3.24, 16: 3.32, 32: 3.45},
        "merge": {4: 6.28, 8: 4.61, 16: 3.10, 32: 2.78},
        "credit": {4: 1.20, 8: 1.61, 16: 1.63, 32: 1.40},
    },
}
# Seconds of queueing a token by requests a second.
FIGURE11A: dict[str, dict[float, float]] = {
    "rr": {2: 0.0066, 3: 0.024, 4: 0.054, 5: 0.374, 6: 0.795, 7: 1.349},
    "proactive": {8: 0.017, 12: 0.185, 16: 0.837, 20: 2.149, 24: 3.046, 28: 6.623, 32: 7.379},
    "dlora": {8: 0.023, 12: 0.082, 16: 0.214, 20: 0.605, 24: 0.936, 28: 1.359, 32: 1.829},
}
# Seconds a token by ratio of lengths.
FIGURE11B: dict[str, dict[float, float]] = {
    "rr": {1: 10.77, 2: 15.66, 4: 21.76, 6: 26.52, 8: 30.98},
    "proactive": {1: 6.13, 2: 10.63, 4: 6.70, 6: 6.52, 8: 6.80},
    "dlora": {1: 2.37, 2: 2.83, 4: 3.02, 6: 3.31, 8: 3.49},
}
# Requests a second by adapters.
FIGURE12: dict[str, dict[float, float]] = {
    "vllm": {16: 1.77, 32: 2.46, 64: 1.26, 128: 0.82},
    "peft": {16: 2.54, 32: 1.91, 64: 1.79, 128: 1.67},
    "dlora": {16: 12.77, 32: 12.78, 64: 12.96, 128: 12.49},
}
# Seconds of switching, of solving, and of the whole run, by requests a second.
FIGURE13: dict[float, tuple[float, float, float]] = {
    8: (1.63, 0.26, 162.3),
    12: (3.42, 0.44, 186.3),
    16: (1.40, 1.24, 182.9),
    20: (2.77, 4.32, 215.2),
    24: (2.54, 5.71, 250.3),
    28: (2.35, 5.07, 278.7),
    32: (3.77, 6.29, 308.5),
}


def rate_at(curve: dict[float, float], bound: float) -> float | None:
    """Where a rising curve first reaches a bound, interpolated linearly; None: it does not, or begins above it."""
    points = sorted(curve.items())
    for (left, low), (right, high) in itertools.pairwise(points):
        if low <= bound < high:
            return left + (right - left) * (bound - low) / (high - low)
    return None
