"""What a replica was sent and has not taken in, which stands in its socket if it does not listen."""

from __future__ import annotations

from collections import deque

from peft_dist.core.sampling_params import SamplingParams

# In a message, at most: a token id, a token's bias with its id, and a character of a stop string.
_TOKEN_BYTES = 5
_BIAS_BYTES = 14
_CHARACTER_BYTES = 4


def most_bytes(num_tokens: int, params: SamplingParams) -> int:
    """That what can be long of a sequence takes in a message. ``num_tokens``: Of its prompt and its output so far."""
    words = _CHARACTER_BYTES * sum(map(len, params.stop))
    if params.structured is not None:
        words += _CHARACTER_BYTES * len(params.structured.text)
    return _TOKEN_BYTES * (num_tokens + len(params.stop_token_ids)) + _BIAS_BYTES * len(params.logit_bias or ()) + words


class Untaken:
    """Sequences that are on their way to a replica, which takes them in as they were sent.

    Attributes:
        num_bytes: As by ``most_bytes``, of all of them.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._sizes: deque[int] = deque()

    def add(self, num_bytes: int) -> None:
        """One more."""
        self._sizes.append(num_bytes)
        self.num_bytes += num_bytes

    def keep(self, number: int) -> None:
        """All but the last so many were taken in."""
        while len(self._sizes) > max(number, 0):
            self.num_bytes -= self._sizes.popleft()
