"""What figures take for a live server's run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from experiments import live

from peft_dist.workload.arrivals import Arrival, Workload
from peft_dist.workload.sending import ClientOptions
from tests.workload.peer import Peer, running


@dataclass
class Counting(Peer):
    """Has switched once for each request, and lets requests wait as long as it has had less than ``warm`` of them."""

    warm: int = 0

    def _metrics(self, writer: asyncio.StreamWriter) -> None:
        count = len(self.bodies)
        self.metrics = [
            f'peft_dist:switches_total{{replica="0"}} {count}\n'
            f'peft_dist:requests_waiting{{replica="0"}} {9 if count < self.warm else 0}\n'
            'peft_dist:requests_running{replica="0"} 1\n'
        ]
        super()._metrics(writer)


def test_a_warm_up_is_no_part_of_what_is_counted() -> None:
    """A request to each of two adapters goes before."""
    peer = Counting(warm=2)
    asked = Workload(tuple(Arrival(0.2 * index, name, 5, 3) for index, name in enumerate("aba")), {})

    async def both() -> live.Measured:
        async with running(peer):
            return await live._run(asked, ClientOptions(peer.url, max_lateness=60.0))

    found = asyncio.run(both())
    assert len(peer.bodies) == 5 and found.requests == 3 and found.failed == 0
    assert found.work.switches == 3 and found.work.queueing == (0.0,)
