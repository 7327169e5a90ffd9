"""A trace like Azure's without its file, fitted to what was published about it.

Shahrad et al., "Serverless in the Wild" (USENIX ATC 2020), sections 3.2 and 3.3, of applications:

- 45 % are invoked at most once an hour on average, 81 % at most once a minute. These two points fix the log-normal of
  the average rates here. It then puts 99.9 % of the calls on those above once a minute; published are 99.6 %.
- Rates span more than 8 orders of magnitude: here they end at 10^8 calls a day.
- Calls of the whole follow the day, over a constant baseline of about half of them: here a sine between half of the
  peak and the peak.

- 40 % have a cv of their inter-arrival times above 1: here so many vary from hour to hour, by a Gamma factor of mean 1.

Not published, and so an assumption: the cv of this factor, ``hourly_cv``. On a public
selection of 1,350 functions of 2019 its median, over the 40 % that vary most, is 1.7 among functions called at least
once an hour and 1.0 among those called ten times an hour; here it is 1.3.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from peft_dist.core.errors import ConfigError
from peft_dist.workload.traces import DAY_MINUTES, Trace, Window

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

AT_MOST_HOURLY = 0.45
AT_MOST_A_MINUTE = 0.81
MOST_A_DAY = 1e8
BASELINE = 0.5
VARYING = 0.4
HOURLY_CV = 1.3
PEAK_HOUR = 18.0
ORIGIN = "synthetic, fitted to Shahrad et al., USENIX ATC 2020: log-normal rates (45 % up to 1/h, 81 % up to 1/min)"


def rate_distribution() -> NormalDist:
    """The natural logarithm of an application's average calls an hour."""
    low, high = NormalDist().inv_cdf(AT_MOST_HOURLY), NormalDist().inv_cdf(AT_MOST_A_MINUTE)
    sigma = math.log(60) / (high - low)
    return NormalDist(-low * sigma, sigma)


def diurnal(minutes: NDArray[np.int64]) -> Floats:
    """How much of the average is called in each minute of the trace; its mean over a day is 1."""
    phase = 2 * np.pi * (minutes / 60 - PEAK_HOUR) / 24
    wave = BASELINE + (1 - BASELINE) * (1 + np.cos(phase)) / 2
    return np.asarray(wave / ((1 + BASELINE) / 2), dtype=np.float64)


def maf_like(num_functions: int, window: Window, seed: int, interval: int = 60, hourly_cv: float = HOURLY_CV) -> Trace:
    """A trace of ``num_functions`` of which those without a call in the window are left out, as from a file.

    Raises ConfigError when nothing was called at all.
    """
    if num_functions < 1 or not (math.isfinite(hourly_cv) and hourly_cv >= 0) or seed < 0:
        raise ConfigError(f"{num_functions} functions, an hourly cv of {hourly_cv}, seed {seed}: none may be negative")
    rates, factors, generator = _rates(num_functions, window, seed, hourly_cv)
    minutes = np.arange(window.start, window.end)
    shape = window.num_intervals(interval)
    hour = minutes // 60 - window.start // 60
    weights = np.zeros((factors.shape[1], shape))
    np.add.at(weights, (hour, (minutes - window.start) // interval), diurnal(minutes) / 60)
    counts = generator.poisson(rates[:, None] * (factors @ weights)).astype(np.int64)
    kept = np.flatnonzero(counts.any(axis=1))
    if not len(kept):
        raise ConfigError(f"none of {num_functions} synthetic functions is called: use more, or a longer window")
    words = (
        f"{ORIGIN}, hourly cv {hourly_cv:g}, seed {seed}, minutes {window.start} to {window.end}, {len(kept)} functions"
    )
    return Trace(tuple(f"synthetic/{index:06d}" for index in kept), counts[kept], words)


def _rates(num_functions: int, window: Window, seed: int, cv: float) -> tuple[Floats, Floats, np.random.Generator]:
    """Calls an hour of each function, and its factor in each hour that the window touches."""
    generator = np.random.default_rng(seed)
    fit = rate_distribution()
    rates = np.minimum(generator.lognormal(fit.mean, fit.stdev, num_functions), MOST_A_DAY / 24)
    hours = (window.end - 1) // 60 - window.start // 60 + 1
    shape = (num_functions, hours)
    varies = generator.random(num_functions) < VARYING
    factors = np.ones(shape)
    if cv:
        factors[varies] = generator.gamma(1 / cv**2, cv**2, (int(varies.sum()), hours))
    return rates, factors, generator


def write_maf1(path: Path, num_functions: int, seed: int, hourly_cv: float = HOURLY_CV) -> None:
    """One day of per-minute counts in the format of the public files of 2019; gzipped when the name ends in .gz.

    Raises ConfigError when the file cannot be written.
    """
    trace = maf_like(num_functions, Window(0, DAY_MINUTES), seed, interval=1, hourly_cv=hourly_cv)
    text = "\n".join(_maf1_lines(trace)) + "\n"
    try:
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another file") from error


def _maf1_lines(trace: Trace) -> Iterator[str]:
    yield ",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, DAY_MINUTES + 1))])
    for name, counts in zip(trace.functions, trace.counts.tolist(), strict=True):
        owner, function = name.split("/")
        yield ",".join([owner, owner, function, "synthetic", *map(str, counts)])
