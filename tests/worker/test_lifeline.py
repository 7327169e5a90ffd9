"""Ends of processes that are noticed, and output that nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from peft_dist.worker.lifeline import watch_process

ROOT = Path(__file__).parents[2]
PRINTING = """
import sys
from peft_dist.worker.lifeline import drop_broken_output
sys.stdin.readline()
if len(sys.argv) > 1:
    drop_broken_output()
print("nobody reads this", flush=True)
"""


def test_the_end_of_a_process_is_noticed_also_when_it_came_before() -> None:
    ended = threading.Event()
    with subprocess.Popen(["sleep", "60"]) as process:
        watch_process(process.pid, ended.set)
        assert not ended.is_set()
        process.kill()
        assert ended.wait(60)
    ended.clear()
    watch_process(process.pid, ended.set)
    assert ended.wait(60)


def test_output_that_nobody_reads_any_more_goes_nowhere() -> None:
    for arguments, status in ((["drop"], 0), ([], 1)):
        read_end, write_end = os.pipe()
        command = [sys.executable, "-c", PRINTING, *arguments]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=write_end, stderr=subprocess.DEVNULL, cwd=ROOT
        ) as process:
            os.close(write_end)
            os.close(read_end)
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
            assert process.wait(60) == status
