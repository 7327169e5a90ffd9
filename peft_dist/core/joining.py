"""What is said between an orchestrator and whoever wants to join it with a replica."""

from __future__ import annotations

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.message_kinds import Command, Report


def host_of_address(address: str, given: str, example: str) -> str:
    """The host of ``tcp://host:port``.

    Args:
        given: How it was given, up to the address: ``--join `` and the like.

    Raises:
        ConfigError: it is no such address.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    # ZeroMQ takes a larger port modulo 65536.
    if not address.startswith("tcp://") or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{given}{address!r} is no address: write for example {example}")
    return host


class Join(Report, frozen=True, kw_only=True):
    """Somebody has room for a replica; repeated until ``Welcome`` comes.

    Who has heard nothing is answered by ``Ping``, and becomes a replica when it says that it did: of one whose link
    works in one direction nobody waits for its start.

    ``attempt``: Counts the replicas that the sender has begun; a later one tells that the last one is over.
    ``is_heard``: Something came from the orchestrator since it asked before.
    """

    host: str
    attempt: int
    is_heard: bool = False


class Leave(Report, frozen=True, kw_only=True):
    """The replica of this attempt wants to go: give it nothing new, move what it has, and tell it to end. Repeated."""

    attempt: int


class Welcome(Command, frozen=True, kw_only=True):
    """Answer to a ``Join`` that ``is_heard``: which incarnation of which replica the sender is from now on, and what it
    is to run.
    """

    attempt: int
    replica_id: int
    incarnation: int
    engine: EngineConfig
    replica_factory: str
    heartbeat_seconds: float
