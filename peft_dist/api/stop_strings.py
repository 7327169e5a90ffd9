"""Finding stop strings in text that comes in pieces, however they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class StopMatch(NamedTuple):
    """``stop`` ends ``end`` characters into the piece that completed it (it may have begun before the piece)."""

    stop: str
    end: int


class StopMatcher:
    """Follows several strings at once through a text (Knuth, Morris, Pratt), each character looked at once.

    Attributes:
        held: How many characters at the end of the text may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # Of strings that end at the same character the longest, which began first, wins.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._beginnings = {stop[0] for stop in self._stops}
        self.held = 0

    def feed(self, piece: str, *, armed: bool = True) -> StopMatch | None:
        """Return the stop string that is complete first in the text with ``piece`` behind it, or None.

        Strings that end in a piece that is not ``armed`` do not count, not later either.
        """
        if not self.held and self._beginnings.isdisjoint(piece):
            return None
        for end, character in enumerate(piece, start=1):
            stop = self._step(character)
            if stop is not None and armed:
                return StopMatch(stop, end)
        self.held = max(self._matched, default=0)
        return None

    def _step(self, character: str) -> str | None:
        complete = None
        for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            matched = self._matched[i]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                complete = complete or stop
                matched = borders[-1]
            self._matched[i] = matched
        return complete


@lru_cache(maxsize=256)
def _borders(stop: str) -> tuple[int, ...]:
    """For each beginning of ``stop``: the length of its longest proper beginning that is also its end."""
    borders = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = borders[length - 1]
        length += stop[i] == stop[length]
        borders[i] = length
    return tuple(borders)
