"""Recordings of engines whose steps take what they are said to: moves of KV go on, other durations decide otherwise."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from peft_dist.core.batch import StepResult
from peft_dist.core.errors import ConfigError
from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import AddRequest, EndExport, Exported, ExportRequests, Imported, ImportRequests
from peft_dist.core.record_file import FULL, End
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.assembly import assemble
from peft_dist.engine.driver import EngineDriver
from peft_dist.engine.recorded_moves import make_handovers
from peft_dist.engine.recording import Collected, Copying, Entry, Import, Submitted, Switched
from peft_dist.sim.executor import SimExecutor
from peft_dist.sim.hardware import dlora
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.sim.replay import ReplayError, read, replay

PROFILE = CostProfile.load("paper-7b")
SPECS = [PROFILE.adapter(f"a{index}", 16) for index in range(3)]
SCRIPT = Path(__file__).parents[2] / "scripts" / "replay.py"


class Side:
    """An engine on a fake device, which is recorded, in a time of its own."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.entries: list[Entry] = []
        self.reports: list[Any] = []
        hardware = dlora(
            PROFILE, SimulationOptions(learns=True, **{"max_num_seqs": 4, "num_blocks": 200, **options}), 0
        )
        self.executor = SimExecutor(hardware.truth, lambda: self.now, hardware.block_bytes, hardware.num_held)
        # As from JSON: what is noted is what was true then.
        self.engine = assemble(
            hardware.config, hardware.model(), self.executor, hardware.prior(), page_rows=1, num_rows=None,
            record=lambda entry: self.entries.append(msgspec.json.decode(msgspec.json.encode(entry), type=Entry)),
        )  # fmt: skip
        self.driver = EngineDriver(self.engine, make_handovers(self.engine), self.reports.append, lambda: self.now)
        for spec in SPECS:
            self.engine.register_adapter(spec)
            self.driver.adapters[spec.content_hash] = spec

    def add(self, name: str, adapter: int, prompt: int, output: int) -> AddRequest:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return AddRequest(request_id=name, prompt_token_ids=[5] * prompt, params=params, seed=1,
                          content_hash=SPECS[adapter].content_hash)  # fmt: skip

    def round(self) -> None:
        before = self.now
        self.driver.step(report=False)
        ends = self.executor.next_end()
        self.now = max(self.executor.collected_at, before + 1e-3 if ends is None or self.engine.has_work else ends)

    def told(self, kind: type[Any]) -> list[Any]:
        return [report for report in self.reports if isinstance(report, kind)]


def busy(side: Side, seed: int, count: int = 40) -> Side:
    rng = random.Random(seed)
    for number in range(count):
        adapter = min(int(rng.paretovariate(1.0)) - 1, 2)
        side.driver.handle(side.add(f"r{number}", adapter, rng.randrange(4, 60), rng.randrange(2, 30)))
        for _ in range(rng.randrange(4)):
            side.round()
    while side.engine.has_work:
        side.round()
    # The last input of a recording may lack answers, and is left out.
    side.engine.abort([])
    return side


def moved(depth: int) -> tuple[Side, Side]:
    """A request goes from one to the other with its KV, one is to go and stays, and both do other things meanwhile."""
    source, target = Side(depth=depth), Side(depth=depth)
    asked = [source.add(f"m{index}", index % 2, 400, 60) for index in range(3)]
    for one in asked:
        source.driver.handle(one)
    for _ in range(20):
        source.round()
    for handover, request in ((1, asked[0]), (2, asked[1])):
        source.driver.handle(ExportRequests(handover=handover, request_ids=[request.request_id]))
    while len(source.told(Exported)) < 2:
        source.round()
    exported = {report.handover: report for report in source.told(Exported)}
    [state] = exported[1].sequences
    assert isinstance(state, SequenceState) and state.kv
    drawn = [1] * state.num_output_tokens
    new = msgspec.structs.replace(asked[0], request_id="m0~1", output_token_ids=drawn)
    target.driver.handle(ImportRequests(handover=1, requests=[new], states=[state]))
    while not target.told(Imported):
        target.round()
    assert target.told(Imported)[0].error is None
    source.driver.handle(EndExport(handover=1, moved=True))
    source.driver.handle(EndExport(handover=2, moved=False))
    return busy(source, 1), busy(target, 2)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_recording_goes_on_behind_a_move_of_kv(depth: int) -> None:
    source, target = moved(depth)
    kinds = {entry.way for entry in source.entries if isinstance(entry, Copying)}
    assert kinds == {"out", "end"} and any(isinstance(entry, Import) for entry in target.entries)
    for side, moves in ((source, 2), (target, 1)):
        found = replay(side.entries)
        assert found.ended is None and found.moves == moves
        assert found.steps == sum(isinstance(entry, Submitted) for entry in side.entries) > 60


def test_blocks_that_are_copied_otherwise_are_told() -> None:
    _, target = moved(0)
    entries = [
        msgspec.structs.replace(entry, blocks=entry.blocks[::-1]) if isinstance(entry, Copying) else entry
        for entry in target.entries
    ]
    with pytest.raises(ReplayError, match="way='in'"):
        replay(entries)


def altered(entries: list[Entry], factor: float) -> list[Entry]:
    """Merged steps took so many times as long as they did, and all that was decided stays written."""
    merged = {entry.step for entry in entries if isinstance(entry, Submitted) and entry.merged_adapter is not None}
    assert merged

    def change(entry: Entry) -> Entry:
        if not isinstance(entry, Collected) or entry.result.step not in merged:
            return entry
        result: StepResult = entry.result
        assert result.seconds is not None
        return Collected(msgspec.structs.replace(result, seconds=factor * result.seconds))

    return [change(entry) for entry in entries]


def test_altered_durations_change_a_replayed_decision() -> None:
    """An engine learns what steps take: merging is given up where merged ones are said to be slow."""
    side = busy(Side(), 3, count=80)
    assert any(isinstance(entry, Switched) for entry in side.entries)
    assert replay(side.entries).steps == replay(altered(side.entries, 1.0)).steps > 100
    with pytest.raises(ReplayError, match=r"recorded is .*, replayed "):
        replay(altered(side.entries, 5.0))


def written(path: Path, entries: list[Entry]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
    return path


def run(*paths: Path) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPT), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_what_is_cut_off_or_broken_is_named_and_others_are_replayed(tmp_path: Path) -> None:
    entries = busy(Side(), 4, count=6).entries
    whole = written(tmp_path / "engine-1-0.jsonl", entries)
    empty = written(tmp_path / "engine-2-0.jsonl", [])
    first = next(index for index, entry in enumerate(entries) if isinstance(entry, Submitted))
    early = written(tmp_path / "engine-3-0.jsonl", entries[:first])
    cut = tmp_path / "engine-4-0.jsonl"
    cut.write_bytes(whole.read_bytes()[:-5])
    other = tmp_path / "engine-5-0.jsonl"
    other.write_text('{"is": "other"}\n')
    full = written(tmp_path / "engine-7-0.jsonl", [*entries, End(FULL)])
    bounded = run(full)
    assert bounded[0] == 0 and "ends there: the file has its 256 MiB" in bounded[1]
    status, told = run(whole, empty, early, cut, other, tmp_path / "engine-6-0.jsonl")
    lines = dict(line.split(": ", 1) for line in told.splitlines())
    assert status == 1 and run(whole)[0] == 0
    assert "alike" in lines[str(whole)] and "ends there" not in lines[str(whole)]
    assert "ends before its first step" in lines[str(empty)] and "ends before its first step" in lines[str(early)]
    assert f"cut off in line {len(entries)}" in lines[str(cut)] and "alike" in lines[str(cut)]
    assert "this is no line of a recording" in told and "cannot be read" in told
    with pytest.raises(ConfigError, match="before its first step"):
        replay(read(early))
