"""Figures 10 and 11a for real: servers of a tiny model on CPU, one for each policy and each kind of migration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from experiments import tables

from tests.tiny_models import make_model, random_adapter, target_modules

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("live")
    made = make_model("llama", root / "model")
    for number in range(8):
        random_adapter(made, root / "adapters" / f"adapter{number}", 4, 8.0, target_modules("llama"), seed=number)
    return root


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
    serve = "--launcher plain --device cpu --threads 1 --max-model-len 256 --num-blocks 128 --max-num-seqs 16"
    asked = f"--scale tiny --rate-factor 8 --max-total 120 --end-id 96 --output {tmp_path}"
    asked += " --adapters 8" if experiment == "fig12_adapters" else ""
    command = [sys.executable, str(ROOT / "scripts" / "experiments" / "here.py"), experiment]
    command += ["--model", str(model / "model"), "--adapters", str(model / "adapters"), "--replicas", str(replicas)]
    command += ["--systems", ",".join(systems), "--serve", serve, "--options", asked]
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
