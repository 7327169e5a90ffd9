"""What each replica's prefix cache is expected to hold, from what was sent there."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft_dist.core.block_hash import chain_hashes
from peft_dist.orchestrator.records import Replica, RequestRecord, SequenceRecord

# About 200 bytes each.
MOST_BLOCKS = 1 << 15
"""Blocks that are remembered of a replica, however many it has."""
MOST_HASHED = 1024
"""Blocks of one request that are looked at: hashing takes a microsecond each, and nobody is served meanwhile."""


@dataclass(slots=True)
class _Known:
    """Names of the blocks of one replica, the ones used last at the end; at most ``most`` of them.

    Attributes:
        blocks: By name, which use was the last one.
        unseen: Those that nobody is known to have computed yet.
    """

    block_size: int
    most: int
    blocks: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    unseen: set[bytes] = field(default_factory=set)
    num_uses: int = 0

    def use(self, hashes: Sequence[bytes]) -> None:
        """The start of a chain is used last, as in ``BlockManager``: no block outlives the ones before it."""
        blocks, unseen = self.blocks, self.unseen
        self.num_uses += 1
        for key in reversed(hashes):
            if key not in blocks:
                unseen.add(key)
            blocks[key] = self.num_uses
            blocks.move_to_end(key)
        while len(blocks) > self.most:
            self._drop_first()

    def last_uses(self, hashes: Sequence[bytes]) -> list[int]:
        """Of the blocks that a chain begins with and that were computed, as far as they are known."""
        found = []
        for key in hashes:
            use = self.blocks.get(key)
            if use is None or key in self.unseen:
                break
            found.append(use)
        return found

    def drop(self, last_use: int) -> None:
        """What was used then for the last time has gone, and so has what was used before."""
        while self.blocks and next(iter(self.blocks.values())) <= last_use:
            self._drop_first()

    def _drop_first(self) -> None:
        key, _ = self.blocks.popitem(last=False)
        self.unseen.discard(key)

    def find(self, hashes: Sequence[bytes]) -> int:
        """How many blocks of a chain are known: those after the first unknown one are unknown too."""
        return bisect_left(hashes, True, key=lambda key: key not in self.blocks)


class Prefixes:
    """Blocks by replica. A guess: replicas drop blocks when they need room, and tell of it to nobody.

    It is corrected by what they find (``found``): they drop what was used the longest ago, so one block that is missing
    tells of all that were used before it.

    Nothing is hashed where ``is_on`` is False, or before a second replica is in the table (``sent`` is not called).
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self._known: dict[int, _Known] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known of any replica."""
        return not self._known

    def cached(self, record: RequestRecord, replica: Replica) -> int:
        """Tokens of a request's prompt whose KV a replica is expected to have; never all, for one must be computed."""
        known = self._known.get(replica.replica_id)
        # Scores of the prompt need all of it computed.
        if known is None or record.params.prompt_logprobs is not None:
            return 0
        found = known.find(_prompt_hashes(record, known.block_size)) * known.block_size
        return min(found, len(record.prompt_token_ids) - 1)

    def sent(self, record: RequestRecord, replica: Replica, *, computes: bool = True) -> None:
        """A replica, which has been ready, was given a request; one with its KV ``computes`` nothing of it."""
        assert replica.model is not None
        model = replica.model
        known = self._known.get(replica.replica_id)
        if known is None:
            known = self._known[replica.replica_id] = _Known(model.block_size, min(model.num_blocks, MOST_BLOCKS))
        hashes = _prompt_hashes(record, known.block_size)
        # Scores of the prompt need all of it computed, so that nothing is looked for.
        looks = computes and record.params.prompt_logprobs is None
        usable = (len(record.prompt_token_ids) - 1) // known.block_size
        record.prefix_uses = known.last_uses(hashes[:usable]) if looks else []
        known.use(hashes)

    def found(self, record: RequestRecord, num_cached_tokens: int) -> None:
        """A replica has computed a request's prompt, but for so many tokens that it had."""
        expected, record.prefix_uses = record.prefix_uses, None
        known = None if record.replica_id is None else self._known.get(record.replica_id)
        if expected is None or known is None:
            return
        known.unseen.difference_update(_prompt_hashes(record, known.block_size))
        num_found = num_cached_tokens // known.block_size
        if num_found < len(expected):
            known.drop(expected[num_found])

    def ended(self, record: RequestRecord, sequence: SequenceRecord) -> None:
        """A sequence ended: what it drew may be the prefix of the next turn. Of its last token there is no KV."""
        known = None if record.replica_id is None else self._known.get(record.replica_id)
        if known is None or not sequence.output_token_ids:
            return
        hashes, size = _prompt_hashes(record, known.block_size), known.block_size
        if len(hashes) >= MOST_HASHED:
            return
        rest = record.prompt_token_ids[len(hashes) * size :] + sequence.output_token_ids[:-1]
        parent = hashes[-1] if hashes else record.content_hash.encode()
        chain = hashes + chain_hashes(parent, rest[: (MOST_HASHED - len(hashes)) * size], size)
        known.use(chain)
        known.unseen.difference_update(chain)

    def forget(self, replica_id: int) -> None:
        """A replica is gone, and its cache with it."""
        self._known.pop(replica_id, None)

    def num_known(self, replica_id: int) -> int:
        """Blocks that are remembered of a replica."""
        known = self._known.get(replica_id)
        return 0 if known is None else len(known.blocks)


def _prompt_hashes(record: RequestRecord, block_size: int) -> list[bytes]:
    """Of the full blocks of its prompt; hashed once."""
    if record.prompt_hashes is None:
        start = record.prompt_token_ids[: MOST_HASHED * block_size]
        record.prompt_hashes = chain_hashes(record.content_hash.encode(), start, block_size)
    return record.prompt_hashes
