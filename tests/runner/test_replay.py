"""What a real engine decided is decided again from its recording, without the model."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.record_file import VARIABLE, End, RecordFile
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.recording import Collected, Entry, Loaded, Submitted, Switched
from peft_dist.runner.replica import Replica, build_replica
from peft_dist.sim.replay import ReplayError, read, replay
from tests.tiny_models import make_model, random_adapter, target_modules

ADAPTERS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    model = make_model("llama", folder / "base")
    for number in range(ADAPTERS):
        random_adapter(model, folder / f"a{number}", 4, 8.0, target_modules("llama"), seed=number)
    return folder


def serve(made: Replica, specs: list[Any], rng: random.Random, count: int) -> None:
    """Requests in bursts, in real time, some aborted, some that end by themselves."""
    for number in range(count):
        adapter = None if rng.random() < 0.1 else specs[min(int(rng.paretovariate(1.0)) - 1, ADAPTERS - 1)]
        prompt = [rng.choice((5, 6, 7))] * 8 + [rng.randrange(3, 90) for _ in range(rng.randrange(1, 24))]
        params = SamplingParams(temperature=1.0, max_tokens=rng.randrange(2, 24), ignore_eos=rng.random() < 0.5)
        made.engine.add_request(Request(f"r{number}", prompt, params, number, time.monotonic(), adapter))
        for _ in range(rng.randrange(4)):
            made.engine.step(time.monotonic())
        if rng.random() < 0.1:
            made.engine.abort([f"r{rng.randrange(number + 1)}"])
    while made.engine.has_work:
        made.engine.step(time.monotonic())


def record(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, second: dict[str, Any] | None = None, **options: Any
) -> list[Entry]:
    monkeypatch.setenv(VARIABLE, str(folder))
    settings: dict[str, Any] = {"max_loras": 2, "num_blocks": 24, "max_num_seqs": 6, "num_threads": 1, **options}
    made = build_replica(EngineConfig(str(root / "base"), device="cpu", **settings))
    specs = [made.load_adapter(f"a{i}", root / f"a{i}", pinned=i == 0) for i in range(ADAPTERS)]
    serve(made, specs, random.Random(3), 50)
    if second is not None:
        made.restart(replace(made.config, **second))
        serve(made, specs, random.Random(4), 20)
    made.close()
    return [entry for path in sorted(folder.glob("*.jsonl")) for entry in read(path)]


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 0, "policy": "credit"},
        {"depth": 1, "policy": "credit", "merged_minority": True},
        {"depth": 0, "policy": "merge", "num_host_blocks": 16, "preemption": "swap"},
        {"depth": 1, "policy": "fcfs"},
    ],
    ids=["credit", "credit-in-flight", "merge-swap", "fcfs"],
)
def test_the_same_is_decided_step_by_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    entries = record(root, tmp_path, monkeypatch, **options)
    found = replay(entries)
    assert found.ended is None and found.engines == 1
    assert found.steps == sum(isinstance(entry, Submitted) for entry in entries) > 50
    assert found.switches == sum(isinstance(entry, Switched) for entry in entries)
    assert any(isinstance(entry, Loaded) for entry in entries)
    # Whether "credit" switches depends on what steps take here and now.
    assert options["policy"] == "credit" or (found.switches > 0) == (options["policy"] == "merge")
    if options.get("num_host_blocks"):
        assert any(isinstance(entry, Submitted) and entry.swap_outs for entry in entries)


def test_engines_that_follow_each_other_are_replayed_in_turn(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replay(record(root, tmp_path, monkeypatch, {"policy": "fcfs"}, policy="merge")).engines == 2


def test_what_was_decided_otherwise_is_told_with_its_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is said to have drawn an end where it did not; and a batch that is said to have been another."""
    entries = record(root, tmp_path, monkeypatch, policy="credit")
    numbers = [index for index, entry in enumerate(entries) if isinstance(entry, Submitted) and entry.sequences]
    index = numbers[20]
    submitted = entries[index]
    assert isinstance(submitted, Submitted)
    changed = [*entries]
    changed[index] = msgspec.structs.replace(submitted, sequences=submitted.sequences[:-1])
    with pytest.raises(ReplayError, match=f"step {submitted.step}: recorded"):
        replay(changed)
    without = [e for e in entries if not (isinstance(e, Collected) and e.result.step == submitted.step)]
    with pytest.raises(ReplayError, match=f"result of step {submitted.step}|after step {submitted.step}"):
        replay(without)


def test_a_recording_is_bounded_and_ends_whole(tmp_path: Path) -> None:
    file = RecordFile(tmp_path, "engine", End("full"), max_bytes=130)
    for _ in range(9):
        file(End("x" * 20))
    file.close()
    assert file.path.stat().st_size <= 130
    assert list(read(file.path)) == [End("x" * 20)] * 2 + [End("full")]


def test_a_folder_is_made_and_what_cannot_be_one_is_refused(tmp_path: Path) -> None:
    RecordFile(tmp_path / "new" / "folder", "engine", End("full")).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{VARIABLE}=.*no recording can be made there"):
        RecordFile(tmp_path / "file", "engine", End("full"))


def test_lines_of_something_else_are_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"is": "end", "why": ""}\n{"is": "other"}\n')
    with pytest.raises(ConfigError, match=r"x:2: this is no line of a recording"):
        list(read(tmp_path / "x"))


def test_nothing_is_recorded_unasked(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    made = build_replica(EngineConfig(str(root / "base"), device="cpu", num_blocks=8, num_threads=1))
    made.close()
    assert type(made.engine).__name__ == "Engine" and not list(tmp_path.iterdir())


def test_a_replay_needs_no_torch() -> None:
    code = "import sys, peft_dist.sim.replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
