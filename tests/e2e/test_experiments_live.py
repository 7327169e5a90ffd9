"""Figures 10, 11a and 11b for real: servers of a tiny model on CPU, one for each policy and each kind of migration.

Rows are looked at, not figures: on a busy machine the client may be as late as it likes.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from experiments import here, tables
from experiments.systems import SYSTEMS

import peft_dist
from tests.tiny_models import make_model, random_adapter, target_modules

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("live")
    made = make_model("llama", root / "model")
    for number in range(8):
        random_adapter(made, root / "adapters" / f"adapter{number}", 4, 8.0, target_modules("llama"), seed=number)
    return root


SERVE = "--launcher plain --device cpu --threads 1 --max-model-len 256 --num-blocks 128 --max-num-seqs 16"
ASKED = "--scale tiny --rate-factor 8 --end-id 96 --max-lateness 60"
# By script: its CSV, the artifact's columns, and what of them is no figure.
POINTS = {
    "fig10_policies": ("fig10", "policy,stride,avg_lat,p90_lat", {"policy": "credit", "stride": 32}),
    "fig11a_migration": (
        "fig11a",
        "migration_type,rate,queueing_delay,adjust_time,solver_time,tot_time",
        {"migration_type": "dlora"},
    ),
    "fig11b_lengths": ("fig11b", "migration_type,ratio,avg_lat", {"migration_type": "dlora"}),
}


@pytest.mark.slow
def test_two_replicas_give_points_of_figures_10_11a_and_11b(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one server: its policy is what the one is about, its migration what the others are."""
    serve = [*SERVE.split(), "--replicas", "2", *here.options_of(SYSTEMS["dlora"])]
    asked = [*ASKED.split(), "--max-total", "40", "--systems", "dlora", "--output", str(tmp_path)]
    with here.serving(str(model / "model"), sorted((model / "adapters").iterdir()), serve) as url:
        for script in POINTS:
            monkeypatch.setattr(sys, "argv", [script, "--server", url, *asked])
            runpy.run_path(str(ROOT / "scripts" / "experiments" / f"{script}.py"), run_name="__main__")
    for name, columns, what in POINTS.values():
        assert (tmp_path / f"{name}.csv").read_text().startswith(f"{columns},")
        about = tables.read_json(tmp_path / f"{name}.json")
        [(system, own)] = about["servers"].items()
        assert (about["mode"], system, own["scale"], own["max_lateness"]) == ("live", "dlora", "tiny", 60)
        assert (own["model"], own["replicas"], own["versions"]["server"]) == ("model", 2, peft_dist.__version__)
        rows = tables.read_csv(tmp_path / f"{name}.csv")
        assert rows and [row["requests"] for row in rows] == [load["requests"] for load in own["loads"]]
        for row in rows:
            assert (row["mode"], row["replicas"], row["failed"]) == ("live", 2, 0) and what.items() <= row.items()
            assert row["avg_lat"] > 0 and row["queueing_delay"] > 0 and "avg_lat=s/token" in row["units"]
            assert row["model"] == "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "name", "replicas", "systems"),
    [
        ("fig10_policies", "fig10", 1, ["fcfs", "merge-artifact", "dlora"]),
        ("fig11a_migration", "fig11a", 2, ["rr", "dlora"]),
        ("fig12_adapters", "fig12", 2, ["vllm", "peft"]),
    ],
)
def test_a_figure_is_measured_on_servers_of_its_own(
    experiment: str, name: str, replicas: int, systems: list[str], model: Path, tmp_path: Path
) -> None:
    """And all that orchestrators and engines decided is decided again from their recordings."""
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    asked = f"{ASKED} --max-total 120 --output {tmp_path}"
    asked += " --adapters 8" if experiment == "fig12_adapters" else ""
    command = [sys.executable, str(ROOT / "scripts" / "experiments" / "here.py"), experiment]
    command += ["--model", str(model / "model"), "--adapters", str(model / "adapters"), "--replicas", str(replicas)]
    command += ["--systems", ",".join(systems), "--serve", SERVE, "--options", asked]
    environment = os.environ | {"PEFT_DIST_RECORD": str(recorded)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    files = sorted(recorded.iterdir())
    assert len(files) == len(systems) * (1 + replicas)
    replay = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "replay.py"), *map(str, files)], capture_output=True, text=True
    )
    assert replay.returncode == 0 and replay.stdout.count("alike") == len(files), replay.stdout + replay.stderr
    rows = tables.read_csv(tmp_path / f"{name}.csv")
    assert {row["system"] for row in rows} == set(systems)
    for row in rows:
        assert (row["mode"], row["replicas"], row["failed"]) == ("live", replicas, 0) and row["avg_lat"] > 0
    about = tables.read_json(tmp_path / f"{name}.json")["servers"]
    for own in about.values():
        # What a server cannot be asked for, the script that started it tells.
        assert own["device"] == own["client"]["cpu"] and own["versions"]["torch"] and own["options"] == SERVE
