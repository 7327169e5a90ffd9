"""A worker's orchestrators, one after another: what is kept when one is gone, and told to the next."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.messages import LoadAdapter, Ready
from peft_dist.core.succession import Adopt, Identity, KeepDrained, NameAdapters, life_of
from peft_dist.worker.channel import Channel
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.heart import Heart
from peft_dist.worker.lifeline import watch_process
from peft_dist.worker.names import NameTable
from peft_dist.worker.replica import Replica
from peft_dist.worker.vigil import Vigil

logger = logging.getLogger(__name__)


class Allegiance:
    """Model and adapters stay, requests do not: their streams are gone with the orchestrator. For the loop's thread."""

    def __init__(self, config: WorkerConfig, channel: Channel, heart: Heart, vigil: Vigil | None) -> None:
        """``vigil`` None: The worker ends with its orchestrator."""
        self._config = config
        self._channel = channel
        self._heart = heart
        self._vigil = vigil
        self._names = NameTable()
        # Names that pin something on the device.
        self._pins: set[str] = set()
        self._is_drained = False
        self._life = life_of(config.epoch)
        if vigil is not None:
            channel.watch(vigil.fileno())

    def hear(self, number: int) -> bool:
        """So many commands have come since the last call; returns whether requests are to be dropped.

        Because the orchestrator was found to be gone, or because it said something that did not arrive: what is left of
        it makes no sense then, and it has others go on with them when it hears that.
        """
        if (missing := self._channel.missing) is not None and self._heart.missed is None:
            self._heart.missed = missing
            self._heart.hurry()
            logger.error("commands %d to %d were lost with a connection: this replica is over", *missing)
            return True
        if self._vigil is None:
            return False
        if number:
            self._vigil.hear()
        return self._vigil.check()

    def limit(self, timeout_ms: int | None) -> int | None:
        """For how long to wait for commands where, without this, it would be ``timeout_ms``; None is without end."""
        own = None if self._vigil is None else self._vigil.timeout_ms()
        known = [limit for limit in (timeout_ms, own) if limit is not None]
        return min(known, default=None)

    def begin_round(self) -> None:
        self._heart.begin_round()

    def rest(self) -> None:
        self._heart.rest()

    def remember(self, command: NameAdapters) -> None:
        """As ``NameAdapters`` says."""
        self._names.apply(command)

    def keep_drained(self, command: KeepDrained) -> None:
        """As ``KeepDrained`` says."""
        self._is_drained = command.is_drained

    def note_pin(self, name: str, *, pinned: bool) -> None:
        """A name pins something from now on, or nothing."""
        (self._pins.add if pinned else self._pins.discard)(name)

    def pins(self, load: LoadAdapter) -> bool:
        """Whether the adapter is to be pinned: a load of an earlier orchestrator may end only now."""
        return load.pinned and life_of(load.call_id) == self._life

    def identify(self) -> None:
        """Say who this is."""
        config = self._config
        identity = Identity(
            guest=config.guest,
            attempt=config.attempt,
            host=socket.gethostname(),
            engine=config.told or config.engine,
            replica_factory=config.replica_factory,
        )
        self._channel.send(identity)

    def follows(self, command: Adopt) -> bool:
        """Whether this is that incarnation already: who was asked several times is adopted as often."""
        return self._channel.is_named(command.replica_id, command.incarnation)

    def follow(self, command: Adopt, replica: Replica, contents: Iterable[AdapterSpec]) -> None:
        """Be the incarnation that a new orchestrator says, which begins with what is here."""
        self._heart.stop()
        self._channel.rename(command.replica_id, command.incarnation)
        self._heart.missed = None
        self._life = life_of(command.incarnation)
        if self._vigil is not None:
            vigil, generation = self._vigil, self._vigil.adopted()
            if command.pid is not None:
                watch_process(command.pid, lambda: vigil.lose(generation, "the orchestrator is gone"))
        # What is pinned is for it to say.
        for name in self._pins:
            replica.engine.pin_adapter(name, None)
        self._pins.clear()
        self._channel.send(
            Ready(
                model=replica.model_info,
                pid=os.getpid(),
                costs=replica.engine.detail().costs,
                contents=list(contents),
                names=self._names.all(),
                names_version=self._names.version,
                is_drained=self._is_drained,
            )
        )
        if command.heartbeat_seconds is not None:
            self._heart.set_pace(command.heartbeat_seconds)
        self._heart.start()
