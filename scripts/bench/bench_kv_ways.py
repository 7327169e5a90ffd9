"""KV from one process to another as between hosts: over TCP, with and without keys, and by NIXL, one after the other.

    python scripts/bench/bench_kv_ways.py [--rounds 21] [--mebibytes 1 16 64]        # needs the extra `nixl`

Each round fetches the same export once by each way over loopback. NIXL is told to go over TCP itself (UCX_TLS=tcp, if
nothing else is set): there is no hardware, and that the system copies memory is no way between hosts. Writes
docs/results/kv_ways.json: bytes a second, medians, and of NIXL to each of the others the median over the rounds; and
how busy the machine was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.handover import KVHandle
from peft_dist.runner.shared_memory import SharedMemory
from peft_dist.worker.kv_server import TcpTransport

WAYS = ("tcp", "tcp with keys", "nixl")
ENDPOINT = "tcp://127.0.0.1:*"


def make(keys: ClusterKeys) -> dict[str, TcpTransport]:
    """A transport for each way."""
    return {way: TcpTransport(ENDPOINT, keys=None if way == "tcp" else keys, with_nixl=way == "nixl") for way in WAYS}


def own(orders: Connection, keys: ClusterKeys, sizes: list[int]) -> None:
    """Offer an export of each size by each way until told to end."""
    ways, memories = make(keys), []
    for size in sizes:
        memory = SharedMemory(size)
        memory.contents.random_(0, 255)
        memories.append(memory)
        for transport in ways.values():
            transport.offer(memory.token, lambda memory=memory: memory.contents)  # type: ignore[misc]
    orders.send(([memory.token for memory in memories], {way: ways[way].address for way in WAYS}))
    orders.recv()
    for transport in ways.values():
        transport.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[1, 16, 64])
    options = parser.parse_args()
    sizes, keys = [each << 20 for each in options.mebibytes], ClusterKeys.make()
    tls = os.environ.setdefault("UCX_TLS", "tcp")
    load = os.getloadavg()[0]
    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    owner = context.Process(target=own, args=(theirs, keys, sizes), daemon=True)
    owner.start()
    tokens, addresses = orders.recv()
    ways = make(keys)
    if ways["nixl"]._nixl is None:
        sys.exit("nixl cannot be used here: pip install -e '.[nixl]'")
    results = {}
    for size, token in zip(sizes, tokens, strict=True):
        # No such process is on this host.
        handles = {way: KVHandle("", 1, size, token, 1 << 30, -1, addresses[way]) for way in WAYS}
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        # The first round makes connections.
        for number in range(options.rounds + 1):
            got = {}
            for way in WAYS:
                began = time.perf_counter()
                got[way] = ways[way].open(handles[way])
                if number:
                    rates[way].append(size / (time.perf_counter() - began))
            assert all(torch.equal(got["tcp"], other) for other in got.values())
        results[f"{size >> 20} MiB"] = {
            "bytes_per_s": {way: round(statistics.median(rates[way])) for way in WAYS},
            "nixl_to": {
                way: round(statistics.median(a / b for a, b in zip(rates["nixl"], rates[way], strict=True)), 2)
                for way in WAYS[:-1]
            },
        }
        print(f"{size >> 20} MiB", results[f"{size >> 20} MiB"])
    assert not ways["nixl"]._nixl._unfit_until, "some came over TCP"
    orders.send("end")
    owner.join()
    for transport in ways.values():
        transport.close()
    told = {"rounds": options.rounds, "UCX_TLS": tls, "load": [load, os.getloadavg()[0]]}
    write_result("kv_ways", told | results)


if __name__ == "__main__":
    main()
