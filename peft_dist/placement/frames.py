"""What a planner and its solver process say to each other, over the process's pipes: length, then msgpack."""

from __future__ import annotations

import struct

import msgspec

from peft_dist.placement.types import ClusterView, MigrationPlan

HEADER = struct.Struct(">I")


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Plan for this view, encoded, within so many seconds from now; answers carry the same ``number``."""

    number: int
    seconds: float
    view: msgspec.Raw
    max_flows: int


class Found(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The best plan so far, or what was wrong with the view; ``last`` when no better one follows."""

    number: int
    last: bool
    plan: MigrationPlan | None = None
    error: str | None = None


class Warm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The process has loaded its libraries, or why it cannot."""

    error: str | None = None


_encoder = msgspec.msgpack.Encoder()
tasks = msgspec.msgpack.Decoder(Task)
founds = msgspec.msgpack.Decoder(Found)
views = msgspec.msgpack.Decoder(ClusterView)
warms = msgspec.msgpack.Decoder(Warm)


def encoded(view: ClusterView) -> msgspec.Raw:
    """A view as it stands in a task."""
    return msgspec.Raw(_encoder.encode(view))


def frame(message: Task | Found | Warm) -> bytes:
    """A message with its length before it."""
    data = _encoder.encode(message)
    return HEADER.pack(len(data)) + data
