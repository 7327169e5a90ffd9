"""What ``peft-dist worker`` does once its options are known."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_dist.worker.joining import JoinSettings


async def run_worker(settings: JoinSettings) -> None:
    """Raises SystemExit with the status of the replica when that is not 0."""
    from peft_dist.core.waiting import StopSignals
    from peft_dist.worker.joining import join

    if code := await join(settings, StopSignals().stop):
        sys.exit(code)
