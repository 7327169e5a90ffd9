"""Lengths of prompts and answers, from every source, and the artifact's filters."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.errors import ConfigError
from peft_dist.workload import lengths
from peft_dist.workload.lengths import SYNTHETIC, Filters, Lengths


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def turns(*counts: int) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": "human", "value": "w " * count} for count in counts]}


TOKENS = st.one_of(st.sampled_from([3, 4, 1023, 1024, 1025]), st.integers(1, 3000))


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=30),
    ratio=st.floats(1, 8),
    max_total=st.sampled_from([2048, 4096]),
)
def test_the_artifacts_filters(pairs: list[tuple[int, int]], ratio: float, max_total: int) -> None:
    found = Filters(max_total=max_total, ratio=ratio).apply(np.array(pairs)).tolist()
    kept = [(p, o) for p, o in pairs if p >= 4 and o >= 4 and p <= 1024 and p + o <= max_total]
    assert found == [[p, int(min((p + o) * ratio, max_total)) - p] for p, o in kept]
    assert all(new >= old for (_, new), (_, old) in zip(found, kept, strict=True)), "outputs only grow"


def test_sharegpt(tmp_path: Path) -> None:
    entries = [turns(5, 7, 9), turns(5), turns(), turns(10, 20), turns(2000, 4)]
    file = tmp_path / "sharegpt.json.gz"
    file.write_bytes(gzip.compress(json.dumps(entries).encode()))
    found = lengths.read_sharegpt(file, words)
    assert found.pairs.tolist() == [[5, 7], [10, 20], [2000, 4]] and "ShareGPT" in found.source
    kept = found.filtered(Filters())
    assert kept.pairs.tolist() == [[5, 7], [10, 20]] and "2 of 3 pass" in kept.source


@pytest.mark.parametrize("bad", [{}, 5, {"conversations": [{"value": 1}, {"value": "a"}]}, {"conversations": "ab"}])
def test_bad_conversations_are_told_by_number(tmp_path: Path, bad: object) -> None:
    (tmp_path / "file").write_text(json.dumps([turns(4, 4), bad, turns(5, 5)]))
    with pytest.raises(ConfigError, match="entry 1 "):
        lengths.read_sharegpt(tmp_path / "file", words)
    found = lengths.read_sharegpt(tmp_path / "file", words, "skip")
    assert found.pairs.tolist() == [[4, 4], [5, 5]] and found.bad.count == 1 and "entry 1 " in found.bad.examples[0]


@pytest.mark.parametrize(("text", "message"), [("{", "no JSON"), ("{}", "no list"), ("[]", "not one length")])
def test_files_that_are_no_sharegpt(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match=message):
        lengths.read_sharegpt(tmp_path / "file", words)


def test_sharegpt_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / lengths.SHAREGPT_FILE).write_text(json.dumps([turns(4, 6), turns(8, 9, 1)]))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert lengths.download_sharegpt(words, str(tmp_path)).pairs.tolist() == [[4, 6], [8, 9]]
    with pytest.raises(ConfigError, match="cannot be had"):
        lengths.download_sharegpt(words, str(tmp_path / "nowhere"))


def test_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("id,prompt_tokens,output_tokens\nx,5,6\ny,7\nz,0,3\n")
    with pytest.raises(ConfigError, match=":3: there are 2 fields"):
        lengths.read_csv(tmp_path / "file")
    found = lengths.read_csv(tmp_path / "file", "skip")
    assert found.pairs.tolist() == [[5, 6]] and found.bad.count == 2
    assert found.bad.examples[1].endswith(":4: prompt_tokens is '0', not a whole number of 1 or more")


def test_fields_of_a_csv_file_may_be_quoted(tmp_path: Path) -> None:
    """As spreadsheets write them; a quote that is not closed spoils its own line alone."""
    rows = ['"id","prompt_tokens","output_tokens"', '"a, b","12",30', 'x,"5,6', '"a ""y""",7,"8"', 'z,"9",8', "w,1,2"]
    (tmp_path / "file").write_text("\r\n".join(rows))
    with pytest.raises(ConfigError, match=":3: there are 2 fields, not 3"):
        lengths.read_csv(tmp_path / "file")
    found = lengths.read_csv(tmp_path / "file", "skip")
    assert found.pairs.tolist() == [[12, 30], [7, 8], [9, 8], [1, 2]] and found.bad.files == {"file": 1}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_lengths_have_the_published_percentiles(name: str) -> None:
    fit = SYNTHETIC[name]
    drawn = fit.draw(100_000, seed=1)
    for column, percentiles in zip(drawn.T, (fit.prompt, fit.output), strict=True):
        assert np.percentile(column, (50, 90)) == pytest.approx(percentiles, rel=0.03)
    source = lengths.synthetic(name, Filters(max_prompt=8000, max_total=9000), seed=1).source
    assert source.startswith("synthetic") and fit.origin in source


def test_samples_use_every_length_before_any_twice() -> None:
    all_of = Lengths(np.arange(20).reshape(10, 2), "test")
    sample = all_of.sample(25, seed=3)
    assert sample.shape == (25, 2) and all_of.sample(0, 3).shape == (0, 2)
    for start in (0, 10):
        assert sorted(sample[start : start + 10].tolist()) == all_of.pairs.tolist()
    assert (all_of.sample(25, seed=3) == sample).all() and (all_of.sample(25, seed=4) != sample).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Filters(ratio=0.5), "ratio"),
        (lambda: Filters(min_prompt=0), "1 or more"),
        (lambda: Filters(max_total=3), "max_total"),
        (lambda: lengths.synthetic("alpaca", Filters(), 0), "azure-conv"),
        (lambda: lengths.fixed(0, 5), "at least 1"),
        (lambda: lengths.fixed(1, 1).filtered(Filters()), "none of 1"),
    ],
)
def test_what_cannot_be_is_refused(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]
