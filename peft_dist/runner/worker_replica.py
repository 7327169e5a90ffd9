"""The replica of a worker: it has what would hold up others later before it takes its first request."""

from __future__ import annotations

import logging

from peft_dist.core.config import EngineConfig
from peft_dist.core.grammars import is_available
from peft_dist.runner.replica import Replica, build_replica

logger = logging.getLogger(__name__)


def build_worker_replica(config: EngineConfig) -> Replica:
    """``build_replica``, with the table for structured outputs where their library is installed.

    Raises:
        ConfigError: as ``build_replica``.
    """
    replica = build_replica(config)
    if is_available() and replica.model_info.tokenizer is not None:
        # The interpreter stops while it is made: better now than between two steps.
        problem = replica.runner.grammars.begin().exception()
        if problem is not None:
            logger.warning("requests with structured outputs will fail: %s", problem)
    return replica
