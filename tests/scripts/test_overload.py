"""Figure 11a's overload by some of dLoRA's rules: what is left out, and that it is there again afterwards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from experiments import overload, tables

from peft_dist.engine import assembly
from peft_dist.policy.settings import PolicySettings
from peft_dist.sim import exec_types

TINY = ("--scale", "tiny", "--rate", "9")


def main(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["overload", *options])
    overload.main()


def test_each_variant_is_told_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = exec_types.EXEC_TYPES
    main(monkeypatch, *TINY, "--output", str(tmp_path))
    assert assembly.PolicySettings is PolicySettings and exec_types.EXEC_TYPES is kinds
    about = tables.read_json(tmp_path / "overload.json")
    assert [row["words"] for row in about["rows"]] == [one.words for one in overload.VARIANTS]
    waits = [row["options"].get("max_adapter_wait") for row in about["rows"]]
    assert waits == [None, "inf", "inf", None, "inf"] and about["load"]["rate"] == 9
    for row in about["rows"]:
        assert row["failed"] == 0 and 0 <= row["wait_mean"] <= row["wait_p99"] <= row["wait_longest"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(overload.VARIANTS) and lines[2].startswith("| bound of 5 s | ")


def test_a_rate_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"--rate 32: Figure 11a at --scale tiny has 1\.5, 5, 9; use one of these"):
        main(monkeypatch, "--scale", "tiny", "--rate", "32", "--output", str(tmp_path))
