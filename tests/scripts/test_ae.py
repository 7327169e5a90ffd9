"""The artifact's scripts: what their arguments become, where they look for data, and what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AE = Path(__file__).parents[2] / "scripts" / "ae"
NOTE = """#!{python}
import json, sys
from pathlib import Path
Path({note!r}).write_text(json.dumps(sys.argv[1:]))
"""


class Desk:
    """A home without data, and a Python that notes what it is to run."""

    def __init__(self, folder: Path) -> None:
        self.home, self._note, python = folder / "home", folder / "note", folder / "python"
        self.home.mkdir()
        python.write_text(NOTE.format(python=sys.executable, note=str(self._note)))
        python.chmod(0o755)
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("PEFT_DIST")} | {
            "HOME": str(self.home),
            "PEFT_DIST_PYTHON": str(python),
        }

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        script, *arguments = command.split()
        return subprocess.run(
            [AE / script, *arguments], env=self._environment | environment, capture_output=True, text=True, timeout=200
        )

    def noted(self) -> list[str]:
        """The script's name, and its arguments."""
        script, *rest = self._noted()
        return [Path(script).name, *rest] if script else []

    def script(self) -> str:
        """As Python was told to run it."""
        return self._noted()[0]

    def _noted(self) -> list[str]:
        return list(json.loads(self._note.read_text())) if self._note.exists() else [""]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


LIVE = "--server http://10.0.0.1:8000 --systems"
END = "--scale paper --output ."


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("fig2b.sh 10.0.0.1", f"fig02b_queueing.py {LIVE} vllm {END}"),
        ("fig2b.sh --sim", f"fig02b_queueing.py {END}"),
        ("fig9_maf1_7b.sh 10.0.0.1 1", f"fig09_end_to_end.py {LIVE} vllm {END} --panels maf1_7b"),
        ("fig9_maf2_70b.sh 10.0.0.1 3", f"fig09_end_to_end.py {LIVE} dlora {END} --panels maf2_70b"),
        (
            "fig9_maf2_13b.sh 10.0.0.1 2 --sim",
            f"fig09_end_to_end.py --systems peft,peft-artifact {END} --panels maf2_13b",
        ),
        ("fig10.sh 10.0.0.1 credit", f"fig10_policies.py {LIVE} dlora {END}"),
        ("fig10.sh 10.0.0.1 fcfs --rate-factor 0.5", f"fig10_policies.py {LIVE} fcfs {END} --rate-factor 0.5"),
        ("fig10.sh --sim 10.0.0.1 merge", f"fig10_policies.py --systems merge,merge-artifact {END}"),
        ("fig10.sh --sim 10.0.0.1 credit", f"fig10_policies.py --systems dlora,dlora-artifact {END}"),
        ("fig9_maf1_13b.sh --sim m 3", f"fig09_end_to_end.py --systems dlora,dlora-artifact {END} --panels maf1_13b"),
        ("fig11a.sh --sim 10.0.0.1 2", f"fig11a_migration.py --systems proactive,proactive-artifact {END}"),
        ("fig11a.sh 10.0.0.1 1", f"fig11a_migration.py {LIVE} rr {END}"),
        ("fig11b.sh 10.0.0.1 2", f"fig11b_lengths.py {LIVE} proactive {END}"),
        ("fig12.sh 10.0.0.1 3 64", f"fig12_adapters.py {LIVE} dlora {END} --adapters 64"),
        ("fig12.sh --sim --jobs 2", f"fig12_adapters.py {END} --jobs 2"),
        ("figure5.sh", "fig05_operators.py --output ."),
        ("fig7.sh --seed 1", "fig07_trace.py --output . --seed 1"),
        ("fig13.sh", "fig13_breakdown.py --output ."),
    ],
)
def test_arguments_are_mapped(desk: Desk, command: str, wanted: str) -> None:
    ended = desk.run(command)
    assert ended.returncode == 0, ended.stderr
    assert desk.noted() == wanted.split()
    assert ("the load is synthetic" in ended.stderr) is (command not in ("figure5.sh", "fig13.sh"))


def test_there_is_one_for_each_panel_and_each_names_an_experiment(desk: Desk) -> None:
    from experiments.fig09_end_to_end import PANELS

    scripts = {path.name for path in AE.glob("*.sh")} - {"common.sh"}
    others = {"fig2b.sh", "figure5.sh", "fig7.sh", "fig10.sh", "fig11a.sh", "fig11b.sh", "fig12.sh", "fig13.sh"}
    assert scripts == others | {f"fig9_{panel}.sh" for panel in PANELS}
    for script in sorted(scripts):
        assert desk.run(f"{script} --sim").returncode == 0
        # With ".." in its path it would not find the package of its own clone, two folders up.
        path = AE.parent / "experiments" / desk.noted()[0]
        assert desk.script() == str(path) and path.is_file()


def test_data_is_found_where_the_artifact_has_it(desk: Desk) -> None:
    for name in ("maf1", "maf2"):
        (desk.home / name).mkdir()
    sharegpt = desk.home / "ShareGPT_V3_unfiltered_cleaned_split.json"
    sharegpt.touch()
    ended = desk.run("fig10.sh --sim", PEFT_DIST_TOKENIZER="folder", PEFT_DIST_SCALE="small", PEFT_DIST_OUTPUT="out")
    assert ended.stderr == "" and desk.noted() == [
        *("fig10_policies.py", "--scale", "small", "--output", "out", "--maf1", str(desk.home / "maf1")),
        *("--maf2", str(desk.home / "maf2"), "--sharegpt", str(sharegpt), "--tokenizer", "folder"),
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fig10.sh", "0 arguments are given: give MASTER POLICY"),
        ("fig10.sh 10.0.0.1 lru", "POLICY is lru: give fcfs, merge or credit"),
        ("fig9_maf1_7b.sh 10.0.0.1 4", "EXEC_TYPE is 4: give 1 (vLLM), 2 (PEFT) or 3 (dLoRA)"),
        ("fig11a.sh 10.0.0.1 0", "MIGRATION_TYPE is 0: give 1 (round robin)"),
        ("fig12.sh 10.0.0.1 3", "2 arguments are given: give MASTER EXEC_TYPE ADAPTERS"),
        ("fig2b.sh --sim 10.0.0.1 3", "2 arguments are given, 1 are known: MASTER"),
    ],
)
def test_what_is_wrong_is_said(desk: Desk, command: str, words: str) -> None:
    ended = desk.run(command)
    assert ended.returncode == 2 and words in ended.stderr and desk.noted() == []
