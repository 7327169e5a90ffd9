"""An export that is offered to other hosts, without a replica."""

from __future__ import annotations

import torch

from peft_dist.core.handover import KVHandle
from peft_dist.runner.shared_memory import SharedMemory
from peft_dist.worker.kv_server import TcpTransport


def offered(owner: TcpTransport, num_bytes: int) -> tuple[SharedMemory, KVHandle]:
    memory = SharedMemory(num_bytes)
    memory.contents.copy_(torch.randint(0, 255, (num_bytes,), dtype=torch.uint8))
    address = owner.offer(memory.token, lambda: memory.contents)
    # No such process is on this host.
    return memory, KVHandle("layout", 1, num_bytes, memory.token, 1 << 30, 3, address)
