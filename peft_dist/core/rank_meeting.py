"""Where the ranks of a replica meet, if whoever starts them has opened the port: nobody else can take it meanwhile."""

from __future__ import annotations

import os
from collections.abc import Mapping

# A descriptor that rank 0 inherits.
_LISTENER = "PEFT_DIST_RANKS_LISTENER"


def meeting_environment(rank: int, size: int, host: str, port: int, listener: int | None) -> dict[str, str]:
    """What a rank is started with, in torch's terms. ``listener``: The descriptor of the open port, of rank 0 alone."""
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        # Torch has no rank open the port then; its own launcher says so too.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return found if listener is None else found | {_LISTENER: str(listener)}


def inherited_listener(environment: Mapping[str, str] = os.environ) -> int | None:
    """The open port at which this rank has the others meet; None where others have it, or torch sees to it."""
    found = environment.get(_LISTENER)
    return None if found is None else int(found)
