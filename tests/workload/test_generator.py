"""Workloads from traces and shares: totals, rates and shares of every interval; synthetic traces; files."""

from __future__ import annotations

import gzip
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.errors import ConfigError
from peft_dist.workload import files, generator, lengths, synthetic
from peft_dist.workload.arrivals import Arrival, Workload, zipf
from peft_dist.workload.describe import describe, plot, table
from peft_dist.workload.generator import Load
from peft_dist.workload.traces import Trace, Window, read_maf1

SIZES = lengths.Lengths(np.array([[5, 6], [7, 8], [9, 10]]), "three lengths")
SIGMAS = 5.0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.tuples(*[st.sampled_from([0, 1, 5, 40])] * 3), min_size=2, max_size=12),
    requests=st.integers(1, 3000),
    rate=st.floats(0.5, 100),
    seed=st.integers(0, 1000),
)
def test_intervals_of_a_trace(counts: list[tuple[int, ...]], requests: int, rate: float, seed: int) -> None:
    trace = Trace(tuple(f"{i:02d}" for i in range(len(counts))), np.array([[1, 1, 0], *counts])[1:], "a test")
    if not trace.counts.any():
        return
    names = ["a", "b", "c"]
    made = generator.from_trace(names, trace, 2, Load(rate, requests, seed=seed), SIZES)
    assert len(made.arrivals) == requests
    calls = trace.by_adapter(3, 2)
    busy = [column for column in calls.T if column.any()]
    parts = [requests // len(busy) + (place < requests % len(busy)) for place in range(len(busy))]
    start, rest = 0.0, iter(made.arrivals)
    for column, count in zip(busy, parts, strict=True):
        own = list(itertools.islice(rest, count))
        if not own:
            continue
        found = np.array([sum(arrival.adapter == name for arrival in own) for name in names])
        shares = column / column.sum()
        assert np.all(np.abs(found - shares * count) <= SIGMAS * np.sqrt(shares * (1 - shares) * count) + 1e-9)
        took, start = own[-1].time - start, own[-1].time
        assert abs(took * rate - count) < SIGMAS * math.sqrt(count) + SIGMAS, "an hour is compressed to the rate"
    assert made.source["lengths"] == "three lengths" and "a test" in made.source["arrivals"]
    assert {(a.prompt_tokens, a.output_tokens) for a in made.arrivals} <= {(5, 6), (7, 8), (9, 10)}


def test_a_seed_gives_the_same_workload_and_another_another() -> None:
    trace = synthetic.maf_like(300, Window(0, 120), seed=5)
    made = [generator.from_trace(["a", "b"], trace, 1, Load(3.0, 50, seed=seed), SIZES) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_correlated_intervals_begin_anew() -> None:
    trace = Trace(("f",), np.array([[1, 1]]), "test")
    made = generator.from_trace(["a"], trace, 1, Load(1.0, 4, correlated=True), SIZES)
    assert [round(arrival.time, 4) for arrival in made.arrivals] == [0.7959, 2.0518, 2.8477, 4.1036]
    assert made.source["streams"] == "correlated, as the artifact's"


@pytest.mark.parametrize("load", [(0, 1), (1, 0), (1, 1, 0), (1, 1, 1, -1)])
def test_loads_that_are_none(load: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError):
        Load(*load)  # type: ignore[arg-type]


def test_a_synthetic_trace_is_as_published() -> None:
    """The two points it is fitted to, and the one that it is not fitted to: 99.6 % of calls are of the busy ones."""
    fit = synthetic.rate_distribution()
    assert fit.cdf(0.0) == pytest.approx(0.45) and fit.cdf(math.log(60)) == pytest.approx(0.81)
    trace = synthetic.maf_like(30_000, Window(0, 1440), seed=0, hourly_cv=0.0)
    a_day = np.zeros(30_000)
    a_day[: len(trace.counts)] = trace.counts.sum(axis=1)
    error = SIGMAS * math.sqrt(0.25 / 30_000)
    assert (a_day <= 1440).mean() == pytest.approx(0.81, abs=error)
    assert (a_day <= 24).mean() == pytest.approx(0.45, abs=error)
    assert a_day[a_day > 1440].sum() / a_day.sum() == pytest.approx(0.996, abs=0.004)
    by_hour = trace.counts.sum(axis=0)
    assert by_hour.min() / by_hour.max() == pytest.approx(synthetic.BASELINE, abs=0.02)
    assert "synthetic" in trace.source and "Shahrad" in trace.source


def test_two_fifths_of_a_synthetic_trace_vary_from_hour_to_hour() -> None:
    trace = synthetic.maf_like(4000, Window(0, 14 * 1440), seed=0)
    busy = trace.counts[trace.counts.sum(axis=1) > 14 * 24 * 100]
    minutes = np.arange(14 * 1440)
    daily = synthetic.diurnal(minutes).reshape(-1, 60).mean(axis=1)
    cv = (busy / daily).std(axis=1) / (busy / daily).mean(axis=1)
    varies = cv > 0.5
    assert varies.mean() == pytest.approx(synthetic.VARYING, abs=SIGMAS * math.sqrt(0.25 / len(busy)))
    assert np.median(cv[varies]) == pytest.approx(synthetic.HOURLY_CV, rel=0.1)
    assert cv[~varies].max() < 0.3


@pytest.mark.parametrize("name", ["day.csv", "day.csv.gz"])
def test_a_synthetic_trace_reads_back(tmp_path: Path, name: str) -> None:
    synthetic.write_maf1(tmp_path / name, 40, seed=3)
    again = (tmp_path / name).read_bytes()
    synthetic.write_maf1(tmp_path / name, 40, seed=3)
    assert (tmp_path / name).read_bytes() == again
    found = read_maf1(tmp_path / name, Window(0, 1440), interval=1)
    made = synthetic.maf_like(40, Window(0, 1440), seed=3, interval=1)
    assert found.counts.tolist() == made.counts.tolist()


NAMES = st.one_of(st.none(), st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8"), min_size=1, max_size=8))
ARRIVALS = st.builds(Arrival, st.floats(0, 1e6), NAMES, st.integers(1, 10**6), st.integers(1, 10**6))


@settings(max_examples=15, deadline=None)
@given(found=st.lists(ARRIVALS, max_size=8), suffix=st.sampled_from(["jsonl", "csv"]))
def test_files_hold_exactly_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, found: list[Arrival], suffix: str
) -> None:
    made = Workload(tuple(sorted(found, key=lambda arrival: arrival.time)), {"seed": 3, "arrivals": "made up"})
    file = tmp_path_factory.mktemp("workload") / f"file.{suffix}"
    files.write(made, file)
    assert files.read(file) == made


LINE = '{"time": 1, "adapter": "a", "prompt_tokens": 1, "output_tokens": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the columns are ''"),
        ("{}\n", ":1: this is no workload"),
        ('{"peft_dist_workload": 1, "requests": 2}\n' + LINE, "1 requests, its header says 2"),
        ('{"peft_dist_workload": 1}\n{"time": 1}\n', ":2: "),
        ("time,adapter,prompt_tokens,output_tokens\n1,a,2,3\n1,a,2\n", ":3: there are 3 fields"),
        ("time,adapter,prompt_tokens,output_tokens\n1,a,2,x\n", ":2: "),
        ("time,adapter,prompt_tokens,output_tokens\n1,a,2,0\n", ":2: .*at least 1"),
        ("time,adapter\n", "columns"),
    ],
)
def test_files_that_are_no_workloads(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        files.read(tmp_path / "file.csv")


def test_zipped_files(tmp_path: Path) -> None:
    made = generator.from_shares(["a"], zipf(1, 0.0), "uniform", Load(1.0, 300), SIZES)
    files.write(made, tmp_path / "plain")
    zipped = gzip.compress((tmp_path / "plain").read_bytes())
    (tmp_path / "zipped").write_bytes(zipped)
    assert files.read(tmp_path / "zipped") == made
    (tmp_path / "cut").write_bytes(zipped[:-200])
    with pytest.raises(ConfigError, match="damaged"):
        files.read(tmp_path / "cut")


def test_a_bare_csv_is_a_workload(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("time,adapter,prompt_tokens,output_tokens\n0.5,sql,2,3\n1,,2,3\n")
    made = files.read(tmp_path / "mine.csv")
    assert made.arrivals == (Arrival(0.5, "sql", 2, 3), Arrival(1.0, None, 2, 3))
    assert made.source == {"arrivals": "mine.csv"} and made.adapters == ["sql", None]


def test_descriptions(tmp_path: Path) -> None:
    load = Load(10.0, 5000, cv=2.0, seed=1)
    made = generator.from_shares([f"a{i}" for i in range(12)], zipf(12, 1.0), "Zipf (1)", load, SIZES)
    found = describe(made)
    assert found.rate == pytest.approx(10, rel=0.15) and found.adapter_cv == pytest.approx(2.0, rel=0.15)
    assert sum(found.requests.values()) == 5000 and next(iter(found.requests)) == "a0"
    text = table(made)
    assert "Zipf (1)" in text and "2 others" in text and "seed:           1" in text
    plot(made, tmp_path / "one.svg")
    plot(made, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()
    with pytest.raises(ConfigError, match="cannot be written"):
        plot(made, tmp_path / "none" / "x.svg")
    with pytest.raises(ConfigError, match="nothing to describe"):
        table(Workload(()))
