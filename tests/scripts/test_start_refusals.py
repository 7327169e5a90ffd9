"""What ``scripts/start_server.sh`` refuses before it draws or fetches anything, and what it says without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts.test_start_server import Desk, arguments


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node[1-3] 1 2 3 127.0.0.1 7 3 3", "no SLURM allocation: run scripts/alloc.sh first"),
        ("localhost 2 2 3 127.0.0.1 7 1 1", "whole merged models, which are not split: TP is 2, give 1"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_drawn(desk: Desk, text: str, words: str) -> None:
    """Adapters for a model of 7 billion weights have 80 MB each, and their shapes come from the hub."""
    desk.add("python", "#!/bin/sh\necho drawn >&2\n")
    given = {"PEFT_DIST_ADAPTERS": "", "PEFT_DIST_PYTHON": str(desk.bin / "python")}
    answer = desk.run("start_server.sh", *arguments(text), **given)
    assert answer.returncode == 2 and words in answer.stderr and "drawn" not in answer.stderr and not desk.notes()


def test_machines_of_an_allocation_are_looked_at_before_anything_is_drawn(desk: Desk) -> None:
    desk.add_slurm()
    desk.add("python", "#!/bin/sh\necho drawn >&2\n")
    given = {"PEFT_DIST_ADAPTERS": "", "PEFT_DIST_PYTHON": str(desk.bin / "python")}
    answer = desk.run("start_server.sh", *arguments("node[1-3] 1 2 3 127.0.0.1 7 3 3"), **given)
    assert answer.returncode == 2 and "name fewer machines" in answer.stderr and "drawn" not in answer.stderr


def test_without_the_model_or_a_network_it_says_what_else_there_is(desk: Desk) -> None:
    given = {"PEFT_DIST_ADAPTERS": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(desk.folder / "hub")}
    answer = desk.run("start_server.sh", *arguments(), **given)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert "NousResearch/Llama-2-7b-hf" in answer.stderr and "PEFT_DIST_WEIGHTS=random" in answer.stderr
