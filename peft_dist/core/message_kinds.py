"""What every message is: a command or a report."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Unknown fields and types are refused."""


class Command(Message, frozen=True, kw_only=True):
    """From the orchestrator to a replica."""


class Report(Message, frozen=True, kw_only=True):
    """From a replica to the orchestrator."""
