"""What replicas ask of a Ray cluster, and what is said where there is none. Needs no ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.worker import ray_cluster
from peft_dist.worker.ray_cluster import RaySettings, bundle, packing

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "peft_dist.cli", "serve", "nowhere/model"]


@pytest.mark.parametrize(
    ("engine", "settings", "cluster", "wanted"),
    [
        ({"device": "cpu", "num_threads": 4}, {}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}),
        ({}, {}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}),
        ({}, {}, {"CPU": 8.0}, {"CPU": 1.0}),
        ({"device": "cuda"}, {"cpus": 0.0}, {}, {"GPU": 1.0}),
        ({"device": "cuda"}, {"cpus": 2.5, "gpus": 0.5}, {}, {"CPU": 2.5, "GPU": 0.5}),
    ],
)
def test_what_a_rank_takes(
    engine: dict[str, object], settings: dict[str, float], cluster: dict[str, float], wanted: dict[str, float]
) -> None:
    options = EngineConfig(model="m", **engine)  # type: ignore[arg-type]
    assert bundle(RaySettings(**settings), options, cluster) == wanted  # type: ignore[arg-type]


def test_what_is_nothing_to_ray() -> None:
    with pytest.raises(ConfigError, match="raise --ray-cpus or --ray-gpus"):
        bundle(RaySettings(cpus=0.0), EngineConfig(model="m", device="cpu"), {})
    with pytest.raises(ConfigError, match="names one GPU of one machine, and Ray chooses: use --device cuda"):
        bundle(RaySettings(), EngineConfig(model="m", device="cuda:1"), {})


def test_ranks_share_a_node_that_is_large_enough() -> None:
    one, small, large = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 64.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 4.0}
    assert packing(one, 4, [small, large]) == "STRICT_PACK"
    assert packing(one, 4, [small, small]) == packing(one, 4, [{"CPU": 64.0}]) == "PACK"
    # Of one rank alone there is nothing to spread, however small the nodes are just now.
    assert packing(one, 1, []) == "STRICT_PACK"


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--cluster ray needs ray: pip install 'peft-dist\[ray\]'"):
        ray_cluster.connect(RaySettings())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cluster", "slurm"], "--cluster 'slurm' is unknown: use one of local, ray"),
        (["--ray-cpus", "2"], "need --cluster ray"),
        (["--cluster", "ray", "--ray-address", "ray://head:10001"], "run it on a node of the cluster|pip install"),
    ],
)
def test_on_the_command_line(options: list[str], words: str) -> None:
    answer = subprocess.run([*SERVE, *options], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert answer.returncode == 1 and any(part in answer.stderr for part in words.split("|"))
    assert answer.stderr.count("\n") == 1
