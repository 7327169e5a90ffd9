"""One export on its way here by NIXL."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq

from peft_dist.runner.shared_memory import MemoryGoneError
from peft_dist.worker.nixl_agent import NixlAgent, NixlError, Read
from peft_dist.worker.nixl_messages import (
    GONE,
    LENT,
    NUM_PIECES,
    PIECE_BYTES,
    RETURN,
    RETURNED,
    VALID,
    WANT,
    WANTED,
)

# Of one reader at once: the owner has memory for two of them.
WINDOW = NUM_PIECES // 2
# Nothing tells of a transfer's end: it is looked for.
NAP_SECONDS = 1e-4
# Between two looks at whether this process ends.
SLICE_MS = 50


@dataclass(frozen=True, slots=True)
class Source:
    """Where an export is read from.

    Attributes:
        socket: A DEALER to who lends its pieces.
        peer, base: The agent there, as this side's knows it, and the address of its memory.
    """

    socket: zmq.Socket[bytes]
    token: bytes
    peer: str
    base: int


@dataclass(slots=True)
class _Piece:
    """Asked for; then lent, and being read."""

    first: int
    length: int
    slot: int
    loan: int = 0
    read: Read | None = None


class Fetching:
    """Asks for pieces of an export, reads them where they are lent, and returns them."""

    def __init__(
        self,
        agent: NixlAgent,
        free: list[int],
        source: Source,
        num_bytes: int,
        stall_seconds: float,
        is_cancelled: Callable[[], bool],
    ) -> None:
        """
        Args:
            free: Pieces of the agent's memory that nothing is read into, at least ``WINDOW``. Changed.
            stall_seconds: For how long nothing may happen.
        """
        self._agent, self._free, self._source = agent, free, source
        self._stall_seconds, self._is_cancelled = stall_seconds, is_cancelled
        self._contents = torch.empty(num_bytes, dtype=torch.uint8)
        self._todo = deque(range(0, num_bytes, PIECE_BYTES))
        self._pieces: dict[bytes, _Piece] = {}
        # Read, but not known to have been lent until then.
        self._num_unsure = 0

    def run(self) -> torch.Tensor:
        """The export: uint8 ``[num_bytes]``.

        Raises:
            MemoryGoneError: it is not there any more.
            NixlError: a transfer failed, or nothing happened for too long.
        """
        happened_at = time.monotonic()
        while self._todo or self._pieces or self._num_unsure:
            self._ask()
            is_reading = any(piece.read is not None for piece in self._pieces.values())
            # Both, in any case.
            if self._take_read() | self._take_answers(0 if is_reading else SLICE_MS):
                happened_at = time.monotonic()
                continue
            if self._is_cancelled():
                raise NixlError("this process ends")
            if time.monotonic() - happened_at > self._stall_seconds:
                raise NixlError(f"nothing came for {self._stall_seconds:g} s")
            time.sleep(NAP_SECONDS)
        return self._contents

    def let_go(self) -> list[tuple[Read, int]]:
        """Give up what is under way: the reads that have not ended, with the piece of memory that each writes to."""
        under_way = []
        for piece in self._pieces.values():
            if piece.read is not None and piece.read.is_under_way:
                under_way.append((piece.read, piece.slot))
            else:
                self._free.append(piece.slot)
        self._pieces.clear()
        return under_way

    def _ask(self) -> None:
        while self._todo and len(self._pieces) < WINDOW:
            first = self._todo.popleft()
            length = min(PIECE_BYTES, len(self._contents) - first)
            request = WANTED.pack(WANT, first, length)
            self._pieces[request] = _Piece(first, length, self._free.pop())
            self._send(request)

    def _take_read(self) -> bool:
        """Copy what has come; whether there was anything."""
        come = [
            key for key, piece in self._pieces.items() if piece.read is not None and self._agent.is_done(piece.read)
        ]
        for request in come:
            piece = self._pieces.pop(request)
            start = piece.slot * PIECE_BYTES
            self._contents[piece.first : piece.first + piece.length] = self._agent.memory[start : start + piece.length]
            self._free.append(piece.slot)
            self._send(RETURNED.pack(RETURN, piece.loan))
            self._num_unsure += 1
        return bool(come)

    def _take_answers(self, wait_ms: int) -> bool:
        """Hear what was said; whether there was anything."""
        if not self._source.socket.poll(wait_ms):
            return False
        request, told = self._source.socket.recv_multipart()
        if request[:1] == RETURN:
            self._num_unsure -= 1
            if told != VALID:
                raise NixlError("a piece was lent to another before it was read")
            return True
        if told == GONE:
            raise MemoryGoneError("the owner has let it go")
        if len(told) != LENT.size:
            raise NixlError("the owner's NIXL has failed")
        piece = self._pieces[request]
        piece.loan, offset = LENT.unpack(told)
        slot = piece.slot * PIECE_BYTES
        piece.read = self._agent.start_read(self._source.peer, self._source.base + offset, slot, piece.length)
        return True

    def _send(self, request: bytes) -> None:
        self._source.socket.send_multipart([self._source.token, request])
