"""Errors that users see: each names what was wrong, where, and the remedy."""

from __future__ import annotations


class PeftDistError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PeftDistError, ValueError):
    """An option, or a combination of options, cannot be used."""


class InvalidRequestError(PeftDistError, ValueError):
    """A request that can never be served as it was asked (HTTP 400).

    ``param`` is the field at fault, in the words of the OpenAI API, or None for the request as a whole.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(PeftDistError, LookupError):
    """The named base model or adapter is not served here (HTTP 404)."""


class AdapterError(PeftDistError, ValueError):
    """An adapter was refused, or an operation on it; the others go on being served (HTTP 400)."""


class UnfitAdapterError(AdapterError):
    """An adapter whose files are whole does not fit this base model or server, however often it is tried."""


class AdapterNameError(AdapterError):
    """An adapter cannot have this name, or not now; nothing was looked at but the name (HTTP 400)."""


class QueueFullError(PeftDistError):
    """The waiting queue is at its bound (HTTP 429). ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(PeftDistError, RuntimeError):
    """The replica that owned the request is gone and nothing can continue it (HTTP 503)."""


class DeviceLostError(PeftDistError, RuntimeError):
    """A device can do nothing more for this process, whoever asks: only another process can use it again."""


class UnknownReplicaError(PeftDistError, LookupError):
    """There is no replica of this number (HTTP 404)."""


class ReplicaStateError(PeftDistError):
    """A replica is not in a state in which this can be done (HTTP 409)."""
