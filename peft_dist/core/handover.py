"""What a sequence takes along when it moves to another replica, beside its tokens and parameters."""

from __future__ import annotations

import msgspec

from peft_dist.core.outputs import PositionLogprobs


class KVHandle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where copied KV blocks, of a part of a sequence, lie in memory, for whoever is to fill blocks with them.

    Attributes:
        layout: What both pools must agree on: shapes of all layers, tokens in a block, element type.
        num_blocks, num_bytes: Of the part.
        token: Stands at the beginning of the memory, so that no other memory is taken for it.
        pid, descriptor: Of the process that holds host memory, and the open file there; on the same host.
        address: Where it is served from, for other hosts; None where nobody serves it.
        seconds: What copying it there took.
        server: Who hands out open files of device memory, on the same host; None where it lies in host memory.
        others: Of a replica whose heads are split over ranks: the same of all further ranks, in their order. All but
            ``num_blocks`` and ``seconds`` are of the first rank's part alone.
    """

    layout: str
    num_blocks: int
    num_bytes: int
    token: str
    pid: int
    descriptor: int
    address: str | None = None
    seconds: float = 0.0
    server: str | None = None
    others: list[KVHandle] = []

    @property
    def total_bytes(self) -> int:
        """Of all ranks."""
        return self.num_bytes + sum(part.num_bytes for part in self.others)


class SequenceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a sequence had come when it was exported.

    Attributes:
        num_output_tokens: Tokens that it had drawn; all of them were reported before.
        num_computed_tokens: Tokens, from the first one on, whose KV is in ``kv``; 0 where there is none.
        kv: Its parts, in the order of the tokens.
        num_cached_tokens: Of its prompt, found in the prefix cache when it began.
        prompt_logprobs: Of a prompt that is partly computed: what was scored so far.
    """

    request_id: str
    num_output_tokens: int
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[PositionLogprobs] = []
    kv: list[KVHandle] = []
