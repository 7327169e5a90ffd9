"""One rank of a replica of two, for tests of moving requests between such replicas.

``python -m tests.moving_ranks MODEL ADAPTER DEPTH FAILS``: rank 0 does what the lines on its standard input say and
answers each by a line; the others follow it, and fail the export that is the FAILS-th of theirs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec

from peft_dist.core.config import EngineConfig
from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import Exported, Imported
from peft_dist.engine.handovers import Handovers
from peft_dist.runner.replica import Replica, build_replica
from tests.e2e.test_handover import Running, request


class Begin(msgspec.Struct, tag=True):
    """Run a request until it has drawn so many tokens."""

    name: str
    prompt: list[int]
    params: dict[str, Any]
    adapted: bool
    until: int


class Export(msgspec.Struct, tag=True):
    name: str


class Import(msgspec.Struct, tag=True):
    """Go on with a request under another name, from its KV or, without, from its tokens."""

    name: str
    begun: Begin
    drawn: list[int]
    state: SequenceState | None


class End(msgspec.Struct, tag=True):
    moved: bool


class Drain(msgspec.Struct, tag=True):
    """Run everything to its end, and tell the tokens of a request."""

    name: str


Order = Begin | Export | Import | End | Drain


class Told(msgspec.Struct):
    drawn: list[int] = []
    state: SequenceState | None = None
    error: str | None = None


class Leader:
    def __init__(self, replica: Replica) -> None:
        self.running = Running(replica)
        [self.spec] = replica.engine.adapters.values()

    def obey(self, order: Order) -> Told:
        replica, drawn = self.running.replica, self.running.drawn
        match order:
            case Begin(name=name, until=until):
                replica.engine.add_request(self._request(name, order, []))
                while len(drawn.get(name, [])) < until:
                    self.running.step()
                return Told(drawn[name])
            case Export(name=name):
                replica.handovers.export(1, [name])
                exported = self.running.wait()
                assert isinstance(exported, Exported)
                return Told(drawn[name], next(iter(exported.sequences), None), exported.error)
            case Import(name=name, begun=begun, state=state):
                moving = self._request(name, begun, order.drawn)
                drawn[name] = list(order.drawn)
                if state is None:
                    replica.engine.add_request(moving)
                    return Told()
                replica.handovers.import_requests(1, [moving], [state])
                imported = self.running.wait()
                assert isinstance(imported, Imported)
                return Told(error=imported.error)
            case End(moved=moved):
                replica.handovers.end_export(1, moved=moved)
                return Told()
            case Drain(name=name):
                self.running.drain()
                self.running.assert_empty()
                return Told(drawn[name])

    def _request(self, name: str, begun: Begin, drawn: list[int]) -> Any:
        return request(name, begun.prompt, begun.params, self.spec if begun.adapted else None, drawn)


def _follow(replica: Replica, fails: int) -> None:
    """``fails``: Which export has no memory."""
    transfers = replica.executor.transfers
    copy_out, num_exports = transfers._copy_out, 0

    def fail_or_copy(*arguments: Any, **options: Any) -> Any:
        nonlocal num_exports
        num_exports += 1
        if num_exports == fails:
            raise OSError("no memory")
        return copy_out(*arguments, **options)

    def close() -> None:
        assert not transfers._exports, "an export that nobody has ended"
        type(transfers).close(transfers)

    transfers._copy_out, transfers.close = fail_or_copy, close  # type: ignore[method-assign]
    replica.follow()


def main() -> None:
    model, adapter, depth, fails = sys.argv[1:]
    config = EngineConfig(
        model, device="cpu", dtype="float32", max_model_len=60, block_size=4, num_blocks=60, max_loras=2,
        depth=int(depth), max_num_batched_tokens=12, tensor_parallel_size=2,
    )  # fmt: skip
    replica = build_replica(config)
    if int(os.environ["RANK"]):
        _follow(replica, int(fails))
        return
    replica.load_adapter("a", adapter)
    replica.handovers = Handovers(replica.engine, ahead_blocks=2)
    leader = Leader(replica)
    print(msgspec.json.encode(replica.model_info.kv_size).decode(), flush=True)
    for line in sys.stdin:
        print(msgspec.json.encode(leader.obey(msgspec.json.decode(line, type=Order))).decode(), flush=True)
    replica.close()


if __name__ == "__main__":
    main()
