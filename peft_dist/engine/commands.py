"""From the orchestrator's words to the engine's objects."""

from __future__ import annotations

from collections.abc import Mapping

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.messages import AddRequest
from peft_dist.core.request import Request


def make_request(command: AddRequest, adapters: Mapping[str, AdapterSpec], now: float) -> Request:
    """The request that a command asks for. ``adapters`` are those registered with the replica, by content hash.

    Raises:
        ValueError: the adapter is not among them.
    """
    adapter = None
    if command.content_hash is not None:
        adapter = adapters.get(command.content_hash)
        if adapter is None:
            raise ValueError(f"this replica does not hold the adapter with content {command.content_hash}")
    return Request(
        request_id=command.request_id,
        prompt_token_ids=command.prompt_token_ids,
        params=command.params,
        seed=command.seed,
        arrival_time=now - command.age,
        adapter=adapter,
        sequence_index=command.sequence_index,
        output_token_ids=list(command.output_token_ids),
    )
