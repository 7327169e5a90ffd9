"""Figures of records, computed by hand; files of them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.errors import ConfigError
from peft_dist.workload import records
from peft_dist.workload.records import Distribution, Objectives, RequestRecord, Run, summarize


def record(index: int = 0, **fields: object) -> RequestRecord:
    made = {
        "adapter": "a",
        "scheduled": 1.0,
        "sent": 1.5,
        "first_token": 2.0,
        "finished": 4.0,
        "prompt_tokens": 7,
        "output_tokens": 5,
        "itl": (0.5, 0.5, 1.0),
    }
    return RequestRecord(index, **{**made, **fields})  # type: ignore[arg-type]


def test_latencies_of_one_request() -> None:
    found = record()
    assert (found.lateness, found.ttft, found.e2e, found.normalized_latency, found.tpot) == (0.5, 0.5, 2.5, 0.5, 0.5)
    none = record(first_token=None, output_tokens=0)
    assert (none.ttft, none.tpot, none.normalized_latency) == (None, None, math.inf)
    assert record(output_tokens=1).tpot is None


def test_figures_of_a_run() -> None:
    failed = record(2, error="HTTP 500", output_tokens=0, first_token=None, finished=2.0, itl=())
    slow = record(1, finished=11.5, queueing=4.0)
    found = summarize([record(0, queueing=0.5), slow, failed])
    assert (found.requests, found.failed, found.duration) == (3, 1, 10.5)
    assert found.request_throughput == pytest.approx(2 / 10.5)
    assert (found.prompt_throughput, found.output_throughput) == pytest.approx((14 / 10.5, 10 / 10.5))
    assert found.normalized_latency == Distribution(2, 1.25, 1.25, pytest.approx(1.85), pytest.approx(1.985))
    assert found.itl is not None and found.itl.count == 6 and found.itl.mean == pytest.approx(4 / 6)
    assert found.queueing_share == pytest.approx(4.5 / 12.5) and found.queueing is not None
    assert found.queueing.mean == 2.25
    assert (found.slo_attainment, found.goodput) == pytest.approx((1 / 3, 1 / 10.5))


@pytest.mark.parametrize(
    ("bounds", "met"),
    [
        ({}, True),
        ({"normalized_latency": 0.49}, False),
        ({"ttft": 0.4}, False),
        ({"ttft": 0.5, "tpot": 0.5, "e2e": 2.5}, True),
        ({"tpot": 0.4}, False),
        ({"e2e": 2.4}, False),
        ({"normalized_latency": None}, True),
    ],
)
def test_objectives(bounds: dict[str, float | None], met: bool) -> None:
    assert Objectives(**bounds).met(record()) is met
    assert not Objectives(normalized_latency=None).met(record(error="lost"))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ttft=0"):
        Objectives(ttft=0)
    with pytest.raises(ConfigError, match="no record"):
        summarize([])
    with pytest.raises(ConfigError, match="cannot be written"):
        records.write_csv(Run((record(),)), tmp_path / "none" / "x")


def test_what_nobody_noted_is_none() -> None:
    found = summarize([record(itl=(), first_token=None)])
    assert found.itl is found.ttft is found.queueing is found.queueing_share is None
    failed = summarize([record(error="lost", finished=1.0)])
    assert failed.normalized_latency is None and failed.goodput == 0 and failed.duration == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_within(values: list[float]) -> None:
    found = Distribution.of([*values, None])
    assert found is not None and found.count == len(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)
    assert found.p50 == pytest.approx(float(np.median(values)))


def test_files(tmp_path: Path) -> None:
    run = Run((record(0), record(1, adapter=None, error="lost, twice", first_token=None)), {"seed": 4})
    records.write_json(run, tmp_path / "run.json")
    assert records.read_json(tmp_path / "run.json") == run
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["summary"]["normalized_latency"]["p99"] == 0.5 and document["summary"]["failed"] == 1
    records.write_csv(run, tmp_path / "run.csv")
    head, *rows = (tmp_path / "run.csv").read_text().splitlines()
    assert json.loads(head.removeprefix("# "))["seed"] == 4
    first, second = csv.DictReader(rows)
    assert (first["adapter"], first["normalized_latency"], first["error"]) == ("a", "0.5", "")
    assert (second["adapter"], second["ttft"], second["error"]) == ("", "", "lost, twice")


@pytest.mark.parametrize("text", ["", "[]", '{"peft_dist_records": 1}', '{"peft_dist_records": 1, "records": [{}]}'])
def test_files_that_hold_no_records(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match="holds no records"):
        records.read_json(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be read"):
        records.read_json(tmp_path / "none")
