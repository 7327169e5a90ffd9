"""The process that looks for a placement: ``python -m peft_dist.placement.placing_process``, one search each.

A thousand adapters take seconds. Rates move so slowly that a process that is started for each search costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Sequence

import msgspec

from peft_dist.placement.placer import Search
from peft_dist.placement.placing import Placement

COMMAND = (sys.executable, "-m", "peft_dist.placement.placing_process")
NICENESS = 10
_encoder = msgspec.msgpack.Encoder()
_searches = msgspec.msgpack.Decoder(Search)
_placements = msgspec.msgpack.Decoder(Placement)


class SearchError(Exception):
    """The process ended without a placement, or not in time."""


async def run_search(search: Search, timeout: float = 60.0, command: Sequence[str] = COMMAND) -> Placement:
    """``search.run()`` in a process of its own, killed after ``timeout`` seconds. Raises SearchError."""
    try:
        # A session of its own: an interrupt from the keyboard is the orchestrator's to answer.
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
    except OSError as error:
        raise SearchError(f"{command[0]} cannot be started: {error}") from error
    try:
        async with asyncio.timeout(timeout):
            found, _ = await process.communicate(_encoder.encode(search))
    except TimeoutError:
        raise SearchError(f"no placement was found within {timeout:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    try:
        return _placements.decode(found)
    except msgspec.MsgspecError as error:
        raise SearchError(f"the search ended with status {process.returncode} and no placement") from error


def main() -> int:
    """One search from standard input to standard output. Returns the exit status."""
    # It is in no hurry, and the event loop is.
    os.nice(NICENESS)
    search = _searches.decode(sys.stdin.buffer.read())
    sys.stdout.buffer.write(_encoder.encode(search.run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
