"""Azure's two formats, windows of them, damaged rows, and what becomes of functions."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.errors import ConfigError
from peft_dist.workload.traces import Trace, Window, read_maf1, read_maf2

DAY = 24 * 60
HEAD1 = ",".join(["HashOwner", "HashApp", "HashFunction", "Trigger", *map(str, range(1, DAY + 1))])
HEAD2 = "app,func,end_timestamp,duration"


def row1(name: str, calls: dict[int, int]) -> str:
    """``calls``: by minute of the day, from 0."""
    return ",".join(["o", "a", name, "http", *(str(calls.get(minute, 0)) for minute in range(DAY))])


def maf1(path: Path, *rows: str) -> Path:
    text = "\n".join([HEAD1, *rows]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def maf2(path: Path, *rows: str, head: str = HEAD2) -> Path:
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


@pytest.mark.parametrize("name", ["day.csv", "day.csv.gz"])
def test_a_day_of_2019(tmp_path: Path, name: str) -> None:
    file = maf1(
        tmp_path / name, row1("b", {0: 1, 59: 2, 60: 4, 119: 8, 120: 16}), row1("a", {61: 3}), row1("c", {200: 1})
    )
    trace = read_maf1(file, Window.parse("0.0.0-0.2.0"))
    assert trace.functions == ("o/a/a", "o/a/b"), "sorted, and without what was not called in the window"
    assert trace.counts.tolist() == [[0, 3], [3, 12]]
    assert "2019" in trace.source and name in trace.source
    by_minute = read_maf1(file, Window.parse("0.0.59-0.1.1"), interval=1)
    assert by_minute.counts.tolist() == [[2, 4]]


def test_several_days_of_2019(tmp_path: Path) -> None:
    maf1(tmp_path / "invocations_per_function_md.anon.d01.csv", row1("f", {DAY - 1: 1, 0: 100}))
    maf1(tmp_path / "invocations_per_function_md.anon.d02.csv.gz", row1("g", {0: 7}), row1("f", {1: 2, 2: 100}))
    trace = read_maf1(tmp_path, Window(DAY - 2, DAY + 2), interval=2)
    assert dict(zip(trace.functions, trace.counts.tolist(), strict=True)) == {"o/a/f": [1, 2], "o/a/g": [0, 7]}
    assert read_maf1(tmp_path, Window.parse("1.0.0-1.1.0")).counts.tolist() == [[102], [7]]
    with pytest.raises(ConfigError, match=r"d03\.csv is missing"):
        read_maf1(tmp_path, Window.parse("2.0.0-2.1.0"))
    with pytest.raises(ConfigError, match="folder"):
        read_maf1(tmp_path / "invocations_per_function_md.anon.d01.csv", Window(0, DAY + 60))


def test_calls_of_2021(tmp_path: Path) -> None:
    rows = ["x,f,0.5,0.1", "y,f,3599.9,10", "x,f,3600,1.5", "x,f,7200,1", "x,f,1e5,0"]
    file = maf2(tmp_path / "AzureFunctionsInvocationTraceForTwoWeeksJan2021.txt", *rows)
    trace = read_maf2(tmp_path, Window(0, 120))
    assert dict(zip(trace.functions, trace.counts.tolist(), strict=True)) == {"x/f": [1, 1], "y/f": [1, 0]}
    assert read_maf2(file, Window(0, 120), at="start").counts.tolist() == [[2, 1], [1, 0]]
    columns = maf2(tmp_path / "more.csv", "0,x,f,9.9,10,0.1", head="id,app,func,start_timestamp,end_timestamp,duration")
    assert read_maf2(columns, Window(0, 60)).counts.tolist() == [[1]]


BAD2 = ["x,f,soon,1", "x,f,1", "x,f,-1,1", "x,f,nan,1", 'x,"f,1', "x,f,1,oops"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["x,f,60,1", *BAD2]), min_size=1, max_size=30))
def test_bad_rows_of_2021_are_told_by_line(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    file = maf2(tmp_path_factory.mktemp("maf2") / "file.txt", "x,f,1,1", *rows)
    wrong = [number for number, row in enumerate(rows, 3) if row in BAD2]
    trace = read_maf2(file, Window(0, 60), on_error="skip")
    assert trace.counts.sum() == 1 + len(rows) - len(wrong)
    assert trace.bad.count == len(wrong) and len(trace.bad.examples) == min(20, len(wrong))
    for number, message in zip(wrong, trace.bad.examples, strict=False):
        assert message.startswith(f"{file}:{number}: ")
    if wrong:
        assert f"{len(wrong)} bad rows skipped" in trace.source
        with pytest.raises(ConfigError, match=f":{wrong[0]}: "):
            read_maf2(file, Window(0, 60))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (row1("x", {5: 1}).replace("o,a", "o"), "1443 fields, not 1444"),
        (row1("x", {}).replace("http,0,0", "http,0,-1"), "minute 2 is '-1'"),
        (row1("x", {}).replace("http,0,0", "http,,12"), "minute 1 is ''"),
        (row1("x", {}).replace("http,0", "http,1.5"), "minute 1 is '1.5'"),
        (row1("x", {}).replace("http,0", "http,²"), "minute 1 is '²'"),
        (row1("x", {}).replace("http,0", "http," + "9" * 40), "minute 1 is '9999"),
    ],
)
def test_bad_rows_of_2019_are_told_by_line(tmp_path: Path, row: str, words: str) -> None:
    file = maf1(tmp_path / "day.csv", row1("good", {3: 5}), row, row1("good2", {3: 1}))
    with pytest.raises(ConfigError, match=f"csv:3: .*{words}"):
        read_maf1(file, Window(0, 60))
    trace = read_maf1(file, Window(0, 60), on_error="skip")
    assert trace.functions == ("o/a/good", "o/a/good2") and trace.bad.count == 1
    assert words in trace.bad.examples[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is empty"),
        (b"a,b,c\n1,2,3\n", ":1: there is no column 'HashOwner'"),
        (b"HashOwner,HashApp,HashFunction,1,2,4\n", ":1: the columns of minutes"),
        (b"HashOwner,HashApp,HashFunction,1,2\n", ":1: there are 2 minutes"),
        (gzip.compress((HEAD1 + "\n" + row1("f", {}) * 500).encode())[:-500], "damaged"),
        ((HEAD1 + "\n" + row1("f", {}) + "\n").encode(), "no function was called"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        read_maf1(tmp_path / "file", Window(0, 60), on_error="skip")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_maf2(tmp_path / "none", Window(0, 60))
    with pytest.raises(ConfigError, match=r"Jan2021\.txt is missing"):
        read_maf2(tmp_path, Window(0, 60))


def test_a_file_that_ends_before_its_window_says_so(tmp_path: Path) -> None:
    """By more than an interval: a quiet end is none."""
    file = tmp_path / "calls.txt"
    file.write_text("app,func,end_timestamp,duration\na,f,60,1\na,f,6000,1\n")
    found = read_maf2(file, Window(0, 360))
    assert "the last call is in minute 100, the window ends at 360" in found.short
    assert "minute 100" in found.source and found.by_popularity().short == found.short
    assert not read_maf2(file, Window(0, 120)).short


@pytest.mark.parametrize("text", ["", "0-1", "0.0.0-0.0.0", "0.2.0-0.1.0", "a.b.c-d.e.f"])
def test_windows_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="window"):
        Window.parse(text)


def test_intervals_fill_their_window() -> None:
    assert Window.parse("1.2.30-1.4.30") == Window(DAY + 150, DAY + 270)
    with pytest.raises(ConfigError, match="divisor"):
        Window(0, 90).num_intervals(60)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40),
    num=st.integers(1, 12),
    stride=st.integers(1, 12),
    sort=st.booleans(),
)
def test_functions_go_to_adapters_by_the_artifacts_rule(
    counts: list[tuple[int, int]], num: int, stride: int, sort: bool
) -> None:
    trace = Trace(tuple(f"{i:03d}" for i in range(len(counts))), np.array(counts), "test")
    if sort:
        trace = trace.by_popularity()
        ranks = [(-int(row.sum()), name) for row, name in zip(trace.counts, trace.functions, strict=True)]
        assert ranks == sorted((-sum(row), f"{i:03d}") for i, row in enumerate(counts))
    found = trace.by_adapter(num, stride)
    wanted = np.zeros((num, 2), dtype=int)
    for index, row in enumerate(trace.counts):
        wanted[index // stride % num] += row
    assert found.tolist() == wanted.tolist()
    assert found.sum() == np.array(counts).sum()


def test_a_larger_stride_skews() -> None:
    trace = Trace(tuple("abcdefgh"), np.arange(8, 0, -1)[:, None], "test")
    hottest = [trace.by_adapter(4, stride)[:, 0].max() for stride in (1, 2, 4)]
    assert hottest == sorted(hottest) and hottest[0] < hottest[-1]
    assert trace.by_adapter(4, 10**20).tolist() == trace.by_adapter(4, 8).tolist()
