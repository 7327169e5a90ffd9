"""Another host's exported KV, read by NIXL."""

from __future__ import annotations

import logging
import threading
import time

import torch
import zmq

from peft_dist.runner.shared_memory import MemoryGoneError
from peft_dist.worker.kv_client import NoAnswerError
from peft_dist.worker.nixl_agent import NixlAgent, NixlError, Read
from peft_dist.worker.nixl_fetching import SLICE_MS, WINDOW, Fetching, Source
from peft_dist.worker.nixl_messages import ADDRESS, GONE, HELLO, NONE, NUM_PIECES

logger = logging.getLogger(__name__)

# Connections are kept: each costs open files, of which the library gives back not all. Most are of processes that
# have ended.
_MOST_PEERS = 64


class NixlReader:
    """Fetches exports, one at a time. Its thread is that of the copies; ``close`` may come from another one."""

    def __init__(self, agent: NixlAgent, silence_ms: int) -> None:
        """
        Args:
            agent: With ``NUM_PIECES * PIECE_BYTES`` bytes of memory.
            silence_ms: Until an owner counts as silent. A transfer that stalls is given up in half of that: another way
                is left then, and takes time too.
        """
        self._agent, self._silence = agent, silence_ms / 1000
        self._lock = threading.Lock()
        self._is_closed = False
        self._free = list(range(NUM_PIECES))
        # Reads that were given up, and the pieces of memory that they may still write to: also when the connection is
        # ended by then, of which the library says that nothing is known of them.
        self._given_up: list[tuple[Read, int]] = []
        # Agents that are connected, by metadata; the one used last is the last.
        self._peers: dict[bytes, str] = {}

    def fetch(self, socket: zmq.Socket[bytes], address: str, token: str, num_bytes: int) -> torch.Tensor:
        """Read an export: uint8 ``[num_bytes]``.

        Args:
            socket: A DEALER to who lends its pieces, at ``address``.

        Raises:
            MemoryGoneError: it is not there any more.
            NoAnswerError: nothing came from there at all.
            NixlError: it has to come another way.
        """
        with self._lock:
            if self._is_closed:
                raise NixlError("this process ends")
            self._take_back()
            if len(self._free) < WINDOW:
                raise NixlError(f"{len(self._given_up)} transfers that stalled have not ended yet")
            told = self._greet(socket, address, token.encode())
            metadata = told[ADDRESS.size :]
            source = Source(socket, token.encode(), self._connect(metadata, address), *ADDRESS.unpack_from(told))
            fetching = Fetching(self._agent, self._free, source, num_bytes, self._silence / 2, lambda: self._is_closed)
            has_failed = False
            try:
                return fetching.run()
            except NixlError:
                has_failed = True
                raise
            finally:
                self._given_up += fetching.let_go()
                self._take_back()
                if has_failed and not self._given_up:
                    # The next attempt begins with a new connection.
                    self._forget(metadata)

    def close(self) -> None:
        """End what is under way, and give back the memory."""
        self._is_closed = True
        with self._lock:
            self._agent.close()

    def _take_back(self) -> None:
        """Use the memory of reads again that have ended since they were given up."""
        still = []
        for read, slot in self._given_up:
            if self._is_over(read):
                self._free.append(slot)
            else:
                still.append((read, slot))
        self._given_up = still

    def _is_over(self, read: Read) -> bool:
        try:
            return self._agent.is_done(read)
        except NixlError:
            return True

    def _greet(self, socket: zmq.Socket[bytes], address: str, token: bytes) -> bytes:
        socket.send_multipart([token, HELLO])
        end = time.monotonic() + self._silence
        while not socket.poll(SLICE_MS):
            if self._is_closed:
                raise NixlError("this process ends")
            if time.monotonic() > end:
                raise NoAnswerError(f"{address} does not answer")
        _, told = socket.recv_multipart()
        if told == NONE:
            raise NixlError("there is no NIXL")
        if told == GONE:
            raise MemoryGoneError(f"{address} has let it go")
        return told

    def _connect(self, metadata: bytes, address: str) -> str:
        peer = self._peers.pop(metadata, None)
        if peer is None:
            peer = self._agent.connect(metadata)
            logger.info("KV of %s comes by NIXL", address)
        self._peers[metadata] = peer
        if len(self._peers) > _MOST_PEERS and not self._given_up:
            self._forget(next(iter(self._peers)))
        return peer

    def _forget(self, metadata: bytes) -> None:
        self._agent.disconnect(self._peers.pop(metadata))
