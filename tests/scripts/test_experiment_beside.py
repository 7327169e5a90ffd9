"""Simulated systems one after another: their rows stand in one file, or are refused."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from experiments import experiment, fig10_policies, fig12_adapters, points
from experiments.settings import Settings
from experiments.tables import read_csv, read_json

from peft_dist.core.errors import ConfigError


def run(folder: Path, *systems: str, seed: int = 3, scale: str = "tiny") -> None:
    experiment.run(fig10_policies.EXPERIMENT, Settings(folder, scale, seed=seed, systems=systems))


def test_systems_one_after_another_are_all_at_once(tmp_path: Path) -> None:
    for system in ("dlora", "fcfs", "dlora"):
        run(tmp_path / "turns", system)
    run(tmp_path / "once", "fcfs", "dlora")
    for name in ("fig10.csv", "fig10.json"):
        assert (tmp_path / "turns" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    about = read_json(tmp_path / "once" / "fig10.json")
    assert list(about["systems"]) == ["fcfs", "dlora"] and len(about["loads"]) == len(about["profiles"]) == 1


def test_numbers_of_adapters_one_after_another(tmp_path: Path) -> None:
    """Of Figure 12, in the order of a run of all of them."""
    for adapters in (32, 16):
        [made] = fig12_adapters.experiments(argparse.Namespace(adapters=adapters))
        experiment.run(made, Settings(tmp_path, "tiny", systems=("grouped",)))
    rows = read_csv(tmp_path / "fig12.csv")
    assert [row["num_models"] for row in rows] == [4, 8] and len(read_json(tmp_path / "fig12.json")["loads"]) == 2


def test_rows_of_another_load_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor lost; whoever runs the same systems again has them replaced."""
    run(tmp_path, "fcfs")
    kept = read_csv(tmp_path / "fig10.csv")
    with monkeypatch.context() as patch:
        patch.setattr(points, "run", lambda *_: pytest.fail("it was run"))
        with pytest.raises(ConfigError, match=r"fig10\.csv has rows of fcfs .* their seed is 3, this run's is 4"):
            run(tmp_path, "dlora", seed=4)
        with pytest.raises(ConfigError, match="their scale is tiny, this run's is small"):
            run(tmp_path, "dlora", scale="small")
        slower = replace(Settings(tmp_path, "tiny", seed=3, systems=("dlora",)), rate_factor=0.5)
        with pytest.raises(ConfigError, match=r"their rate_factor is 1\.0, this run's is 0\.5"):
            experiment.run(fig10_policies.EXPERIMENT, slower)
        (tmp_path / "fig10.json").unlink()
        with pytest.raises(ConfigError, match="their scale is None, this run's is tiny"):
            run(tmp_path, "dlora")
    assert read_csv(tmp_path / "fig10.csv") == kept
    run(tmp_path, "fcfs", seed=4)
    assert len(read_csv(tmp_path / "fig10.csv")) == len(kept)
