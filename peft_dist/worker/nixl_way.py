"""KV that goes from host to host by NIXL, where that is asked for and can be had; otherwise by TCP."""

from __future__ import annotations

import logging
import time

import torch

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.worker.kv_address import host_of
from peft_dist.worker.kv_client import SILENCE_MS, connected
from peft_dist.worker.nixl_agent import NixlAgent, NixlError, load_library
from peft_dist.worker.nixl_messages import NUM_PIECES, PIECE_BYTES
from peft_dist.worker.nixl_reader import NixlReader
from peft_dist.worker.nixl_server import Contents, NixlServer

logger = logging.getLogger(__name__)

_UNFIT_SECONDS = 60.0


class NixlWay:
    """One agent to read with, and one to be read from: each is used on a thread of its own.

    Attributes:
        server: To be closed with its thread.
    """

    def __init__(self, reading: NixlAgent, serving: NixlAgent, contents: Contents, silence_ms: int) -> None:
        self.server = NixlServer(serving, contents)
        self._reader, self._silence_ms = NixlReader(reading, silence_ms), silence_ms
        # By address, until when nobody tries it there.
        self._unfit_until: dict[str, float] = {}

    def fetch(self, address: str, token: str, num_bytes: int, keys: ClusterKeys | None) -> torch.Tensor | None:
        """Another host's export: uint8 ``[num_bytes]``; None, with the reason logged, where it has to come by TCP.

        Raises:
            MemoryGoneError: it is not there any more, or nobody answers (NoAnswerError).
        """
        now = time.monotonic()
        if now < self._unfit_until.get(address, 0.0):
            return None
        try:
            with connected(address, self._silence_ms, keys) as socket:
                return self._reader.fetch(socket, address, token, num_bytes)
        except NixlError as error:
            logger.warning("KV of %s comes over TCP, for %g s: %s", address, _UNFIT_SECONDS, error)
            self._unfit_until = {each: until for each, until in self._unfit_until.items() if until > now}
            self._unfit_until[address] = time.monotonic() + _UNFIT_SECONDS
            return None

    def close(self) -> None:
        """Read nothing any more."""
        self._reader.close()


def choose_nixl(endpoint: str, contents: Contents, silence_ms: int = SILENCE_MS) -> NixlWay | None:
    """For a replica that serves its KV at ``endpoint``; None, with the reason logged, where NIXL cannot be had.

    ``contents`` is called on the thread that calls the way's server.
    """
    # What is not to be reached from other machines must not be so by this way, which knows no keys.
    devices = "lo" if host_of(endpoint).startswith("127.") else None
    try:
        library = load_library()
        reading, serving = (NixlAgent(library, NUM_PIECES * PIECE_BYTES, devices) for _ in range(2))
    except NixlError as error:
        logger.warning("KV goes to other hosts over TCP, not by NIXL: %s", error)
        return None
    if devices is None:
        logger.warning(
            "KV goes to other hosts by NIXL, unencrypted, and whoever reaches UCX's ports can read and write this "
            "process's memory: let no one but the cluster's machines (UCX_NET_DEVICES names the devices it may use)"
        )
    else:
        logger.info("KV goes to other processes by NIXL, on this machine's loopback alone")
    return NixlWay(reading, serving, contents, silence_ms)
