"""Stands in for NIXL's library: agents of one process, whose reads are done when their owner makes progress."""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from dataclasses import dataclass, field
from typing import Any

import pytest


class BackendError(Exception):
    """As the library's own, which have no base."""


class DisconnectError(Exception):
    """As well."""


@dataclass
class Transfer:
    reader: str
    owner: str
    ours: tuple[int, int]
    theirs: tuple[int, int]
    state: str = "PROC"
    releases: int = 0

    def release(self) -> None:
        assert self.state != "PROC", "it would still write"
        self.releases += 1

    def finish(self) -> None:
        ctypes.memmove(self.ours[0], self.theirs[0], self.ours[1])
        self.state = "DONE"


@dataclass
class World:
    """What all agents share, and how they fail.

    Attributes:
        missing: The library has no such back end.
        failing: What a transfer raises when it is looked at.
        broken: What progress raises.
        stands_still: Transfers are not carried on.
        has_begun: Set with the first transfer.
    """

    agents: dict[str, Agent] = field(default_factory=dict)
    transfers: list[Transfer] = field(default_factory=list)
    registered: list[tuple[int, int]] = field(default_factory=list)
    devices: list[str | None] = field(default_factory=list)
    connected: list[tuple[str, str]] = field(default_factory=list)
    disconnected: list[tuple[str, str]] = field(default_factory=list)
    missing: bool = False
    failing: Exception | None = None
    broken: Exception | None = None
    stands_still: bool = False
    has_begun: threading.Event = field(default_factory=threading.Event)

    def under_way(self) -> list[Transfer]:
        return [transfer for transfer in self.transfers if transfer.state == "PROC"]


class Agent:
    """As ``nixl_agent``: what is used of it."""

    def __init__(self, world: World, name: str, config: dict[str, Any]) -> None:
        assert config == {"enable_prog_thread": False, "backends": []}
        self._world, self._name = world, name
        self._has_backend = False
        world.agents[name] = self

    def create_backend(self, backend: str, parameters: dict[str, str]) -> None:
        assert backend == "UCX"
        if self._world.missing:
            raise BackendError("NIXL_ERR_NOT_FOUND")
        self._world.devices.append(parameters.get("ucx_devices"))
        self._has_backend = True

    def register_memory(self, regions: list[tuple[int, int, int, str]], kind: str) -> tuple[int, int]:
        assert self._has_backend and kind == "DRAM"
        [(address, length, _, _)] = regions
        self._world.registered.append((address, length))
        return address, length

    def deregister_memory(self, region: tuple[int, int]) -> None:
        self._world.registered.remove(region)

    def get_agent_metadata(self) -> bytes:
        return self._name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        assert metadata.decode() in self._world.agents
        self._world.connected.append((self._name, metadata.decode()))
        return metadata

    def remove_remote_agent(self, name: str) -> None:
        assert not [each for each in self._world.under_way() if (each.reader, each.owner) == (self._name, name)]
        self._world.disconnected.append((self._name, name))

    def get_xfer_descs(self, regions: list[tuple[int, int, int]], kind: str) -> tuple[int, int]:
        assert kind == "DRAM"
        [(address, length, _)] = regions
        inside = [start <= address and address + length <= start + size for start, size in self._world.registered]
        assert any(inside)
        return address, length

    def initialize_xfer(self, way: str, ours: tuple[int, int], theirs: tuple[int, int], peer: str) -> Transfer:
        assert way == "READ" and ours[1] == theirs[1]
        return Transfer(self._name, peer, ours, theirs)

    def transfer(self, transfer: Transfer) -> str:
        self._world.transfers.append(transfer)
        self._world.has_begun.set()
        return transfer.state

    def check_xfer_state(self, transfer: Transfer) -> str:
        if self._world.failing is not None:
            transfer.state = "ERR"
            raise self._world.failing
        return transfer.state

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        if self._world.broken is not None:
            raise self._world.broken
        if not self._world.stands_still:
            for transfer in self._world.under_way():
                if transfer.owner == self._name:
                    transfer.finish()
        return {}


def install(patch: pytest.MonkeyPatch) -> World:
    """Have ``nixl`` be this, until ``patch`` is undone."""
    world = World()
    api, bindings = types.ModuleType("nixl._api"), types.ModuleType("nixl._bindings")
    api.nixl_agent = lambda name, config: Agent(world, name, config)  # type: ignore[attr-defined]
    api.nixl_agent_config = dict  # type: ignore[attr-defined]
    bindings.nixlBackendError = BackendError  # type: ignore[attr-defined]
    bindings.nixlRemoteDisconnectError = DisconnectError  # type: ignore[attr-defined]
    for module in (types.ModuleType("nixl"), api, bindings):
        patch.setitem(sys.modules, module.__name__, module)
    return world
