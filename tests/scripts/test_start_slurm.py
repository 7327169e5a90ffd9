"""Which machine of an allocation serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts.test_start_server import Desk, arguments, option

# The second machine is this one, and is called by its name or its address.
GETENT = """#!/bin/sh
case $2 in node2 | 127.0.0.1) echo 127.0.0.1 STREAM $2 ;; *) exit 2 ;; esac
"""


@pytest.mark.parametrize("master", ["127.0.0.1", "node2"])
def test_any_machine_of_the_allocation_may_be_the_master(tmp_path: Path, master: str) -> None:
    desk = Desk(tmp_path)
    desk.add_slurm()
    desk.add("getent", GETENT)
    answer = desk.run("start_server.sh", *arguments(f"node[1-3] 1 4 1 {master} 7 3 3"))
    assert answer.returncode == 0, answer.stderr
    _, *joined, server, last = desk.notes()
    assert server[0] == "1" and server[2] == "serve" and option(server, "--host") == master
    # Of 4 replicas the first machine has two.
    assert option(server, "--replicas") == "1" and [note[0] for note in (*joined, last)] == ["0", "0", "2"]
    assert all(note[2:5] == ["worker", "--join", f"tcp://{master}:5600"] for note in (*joined, last))
