"""When replicas that died are started again."""

from __future__ import annotations

from dataclasses import dataclass

from peft_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Exponential back-off, which forgets after a while of serving. Times in seconds.

    Attributes:
        first, longest: Wait before the first restart, and at most; each early death doubles it.
        stable: A replica that served for so long did not die early.
        max_failures: After so many early deaths of one replica in a row it stays dead.
    """

    first: float = 1.0
    longest: float = 60.0
    stable: float = 60.0
    max_failures: int = 6

    def __post_init__(self) -> None:
        if not (0 <= self.first <= self.longest and self.stable >= 0 and self.max_failures >= 1):
            raise ConfigError(f"{self} cannot be used: give 0 <= first <= longest, stable >= 0 and max_failures >= 1")

    def failures(self, before: int, served: float) -> int:
        """Early deaths in a row, with the one of a replica that had ``before`` and ``served`` for some seconds."""
        return 1 if served >= self.stable else before + 1

    def wait(self, failures: int) -> float | None:
        """Seconds until the next start, None for never."""
        return None if failures >= self.max_failures else min(self.first * 2.0 ** (failures - 1), self.longest)
