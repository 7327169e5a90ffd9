"""Where a replica's KV is served to other hosts, from where the orchestrator listens."""

from __future__ import annotations

import logging
import socket

logger = logging.getLogger(__name__)
NOWHERE = "none"
# Of the port no more is needed than that it is one: nothing is sent.
_ANY_PORT = 9
_EVERY_ADDRESS = ("0.0.0.0", "*")


def of_server(listen: str, *, has_keys: bool) -> str | None:
    """For replicas beside an orchestrator that listens at ``tcp://host:port``: the same host, as open as that.

    Where it listens on every address, so do they; whoever is to read there knows the orchestrator's host by the address
    that it joined (``reachable``).
    """
    return _if_safe(host_of(listen).replace("localhost", "127.0.0.1"), has_keys=has_keys)


def of_guest(server: str, *, has_keys: bool) -> str | None:
    """For a replica that joined the orchestrator at ``tcp://host:port``: the address of this host on the way there.

    None, with the reason logged, where there is none; or where it could be reached from other machines without keys.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect((host_of(server), _ANY_PORT))
        except OSError as error:
            logger.warning("KV is not offered to other hosts: no address of this one reaches %s (%s)", server, error)
            return None
        own: str = way.getsockname()[0]
    return _if_safe(own, has_keys=has_keys)


def reachable(address: str, home: str | None) -> str:
    """An address at which KV is offered, by ``home``, the orchestrator's host, if that is where "every address" is."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return f"tcp://{home}:{port}" if home is not None and host in _EVERY_ADDRESS else address


def host_of(endpoint: str) -> str:
    """Of ``tcp://host:port``."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0]


def _if_safe(host: str, *, has_keys: bool) -> str | None:
    return f"tcp://{host}:*" if has_keys or host.startswith("127.") else None
