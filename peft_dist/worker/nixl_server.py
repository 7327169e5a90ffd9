"""Pieces of exports that others read by NIXL: copied to memory that is always there, and lent for a while."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peft_dist.worker.nixl_agent import NixlAgent, NixlError
from peft_dist.worker.nixl_messages import (
    ADDRESS,
    GONE,
    HELLO,
    LENT,
    NONE,
    NUM_PIECES,
    OVER,
    PIECE_BYTES,
    RETURN,
    RETURNED,
    VALID,
    WANT,
    WANTED,
)

logger = logging.getLogger(__name__)

# To a reader that is not heard of; one that is there gives up sooner.
_LOAN_SECONDS = 10.0
_MOST_WAITING = 256

Contents = Callable[[bytes], torch.Tensor | None]
"""Of an export, by its token: uint8 ``[num_bytes]`` on the host; None where it is gone."""
Answer = tuple[bytes, bytes, bytes]
"""To whom, to what, and the answer."""


@dataclass(frozen=True, slots=True)
class _Loan:
    slot: int
    until: float


class NixlServer:
    """Answers those who read by NIXL. For one thread, but for ``close``, which comes after it."""

    def __init__(
        self,
        agent: NixlAgent,
        contents: Contents,
        loan_seconds: float = _LOAN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``agent``: With ``NUM_PIECES * PIECE_BYTES`` bytes of memory."""
        self._agent, self._contents = agent, contents
        self._loan_seconds, self._clock = loan_seconds, clock
        self._loans: dict[int, _Loan] = {}
        self._free = list(range(NUM_PIECES))
        self._num_lent = 0
        self._waiting: deque[tuple[bytes, bytes, bytes]] = deque(maxlen=_MOST_WAITING)
        self._is_broken = False

    @property
    def is_busy(self) -> bool:
        """Whether somebody may be reading, who waits for ``progress``."""
        return bool(self._loans)

    def progress(self) -> list[Answer]:
        """Carry on others' reads, and give up loans that are over; answers to those who waited for these."""
        try:
            self._agent.progress()
        except NixlError as error:
            logger.warning("KV goes to other hosts over TCP from now on: NIXL failed (%s)", error)
            self._is_broken = True
            self._loans.clear()
        now = self._clock()
        for number in [number for number, loan in self._loans.items() if loan.until <= now]:
            self._free.append(self._loans.pop(number).slot)
        return self._serve_waiting()

    def answer(self, who: bytes, token: bytes, request: bytes) -> list[Answer] | None:
        """Answers to this request and to those whose wait it ends; None: it is none of NIXL's."""
        if request == HELLO:
            return [(who, request, self._introduce(token))]
        if len(request) == WANTED.size and request[:1] == WANT:
            self._waiting.append((who, token, request))
            return self._serve_waiting()
        if len(request) == RETURNED.size and request[:1] == RETURN:
            loan = self._loans.pop(RETURNED.unpack(request)[1], None)
            if loan is None:
                return [(who, request, OVER)]
            self._free.append(loan.slot)
            return [(who, request, VALID), *self._serve_waiting()]
        return None

    def close(self) -> None:
        """Give back the memory."""
        self._agent.close()

    def _introduce(self, token: bytes) -> bytes:
        if self._is_broken:
            return NONE
        return GONE if self._contents(token) is None else ADDRESS.pack(self._agent.address) + self._agent.metadata

    def _serve_waiting(self) -> list[Answer]:
        answers = []
        while self._waiting and (self._free or self._is_broken):
            who, token, request = self._waiting.popleft()
            answers.append((who, request, self._lend(token, request)))
        return answers

    def _lend(self, token: bytes, request: bytes) -> bytes:
        if self._is_broken:
            return NONE
        _, first, length = WANTED.unpack(request)
        whole = self._contents(token)
        if whole is None or not 0 < length <= min(PIECE_BYTES, len(whole) - first):
            return GONE
        slot = self._free.pop()
        start = slot * PIECE_BYTES
        # By numpy: torch would take further threads for it, beside those of the model.
        self._agent.memory.numpy()[start : start + length] = whole.numpy()[first : first + length]
        self._num_lent += 1
        self._loans[self._num_lent] = _Loan(slot, self._clock() + self._loan_seconds)
        return LENT.pack(self._num_lent, start)
