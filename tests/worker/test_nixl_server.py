"""Pieces that are lent to readers by NIXL: who gets one when, and for how long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from peft_dist.worker.nixl_agent import NixlAgent, load_library
from peft_dist.worker.nixl_messages import (
    GONE,
    HELLO,
    LENT,
    NUM_PIECES,
    OVER,
    PIECE_BYTES,
    RETURN,
    RETURNED,
    VALID,
    WANT,
    WANTED,
)
from peft_dist.worker.nixl_server import NixlServer
from tests.worker.nixl_stand_in import install

LOAN_SECONDS = 10.0
CONTENTS = torch.arange(256, dtype=torch.uint8).repeat(20 * PIECE_BYTES // 256)


class Lending:
    """A server with one export, ``b"t"``, and a clock that is turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.agent = NixlAgent(load_library(), NUM_PIECES * PIECE_BYTES)
        self.server = NixlServer(self.agent, {b"t": CONTENTS}.get, LOAN_SECONDS, lambda: self.now)

    def want(self, number: int, length: int = PIECE_BYTES, token: bytes = b"t") -> list[bytes]:
        """What is answered to a request for one piece."""
        answers = self.server.answer(b"reader", token, WANTED.pack(WANT, number * PIECE_BYTES, length))
        assert answers is not None
        return [told for _, _, told in answers]

    def give_back(self, loan: int) -> list[bytes]:
        answers = self.server.answer(b"reader", b"t", RETURNED.pack(RETURN, loan))
        assert answers is not None
        return [told for _, _, told in answers]


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> Lending:
    install(monkeypatch)
    return Lending()


def test_pieces_lie_where_the_answers_say(lending: Lending) -> None:
    for number in range(NUM_PIECES):
        [told] = lending.want(number, 300 + number)
        _, start = LENT.unpack(told)
        first = number * PIECE_BYTES
        assert torch.equal(lending.agent.memory[start : start + 300 + number], CONTENTS[first : first + 300 + number])


def test_who_finds_nothing_to_lend_waits_for_its_turn(lending: Lending) -> None:
    loans = [LENT.unpack(lending.want(number)[0]) for number in range(NUM_PIECES)]
    assert lending.want(8) == lending.want(9) == []
    said, lent = lending.give_back(loans[3][0])
    assert said == VALID and LENT.unpack(lent)[1] == loans[3][1]
    assert lending.give_back(loans[3][0]) == [OVER], "it is lent to another by now"
    said, lent = lending.give_back(loans[5][0])
    assert said == VALID and LENT.unpack(lent)[1] == loans[5][1]


def test_a_loan_ends_by_itself_and_its_reader_is_told(lending: Lending) -> None:
    loans = [LENT.unpack(lending.want(number)[0])[0] for number in range(NUM_PIECES)]
    assert lending.want(8) == []
    lending.now = LOAN_SECONDS - 0.1
    assert lending.server.progress() == [] and lending.server.is_busy
    lending.now = LOAN_SECONDS
    [(who, request, told)] = lending.server.progress()
    assert who == b"reader" and request == WANTED.pack(WANT, 8 * PIECE_BYTES, PIECE_BYTES) and len(told) == LENT.size
    assert lending.give_back(loans[0]) == [OVER]
    assert lending.give_back(LENT.unpack(told)[0]) == [VALID]
    assert not lending.server.is_busy


@pytest.mark.parametrize(
    "ask",
    [
        lambda lending: lending.want(20, 1),
        lambda lending: lending.want(19, PIECE_BYTES + 1),
        lambda lending: lending.want(0, PIECE_BYTES + 1),
        lambda lending: lending.want(0, 0),
        lambda lending: lending.want(1 << 40),
        lambda lending: lending.want(0, token=b"another"),
    ],
)
def test_what_is_not_there_is_not_lent(lending: Lending, ask: Callable[[Lending], list[bytes]]) -> None:
    assert ask(lending) == [GONE] and not lending.server.is_busy


def test_only_what_is_nixls_is_answered(lending: Lending) -> None:
    assert lending.server.answer(b"reader", b"another", HELLO) == [(b"reader", HELLO, GONE)]
    for request in (b"", b"x" * WANTED.size, b"x" * RETURNED.size, b"\0" * 16):
        assert lending.server.answer(b"reader", b"t", request) is None
