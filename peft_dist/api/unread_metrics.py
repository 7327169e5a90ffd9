"""What clients have not read, as families of metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily


class UnreadView(NamedTuple):
    """
    Attributes:
        num_sequences: That have ended, and whose last tokens nobody has taken yet.
        num_bytes: Of answers, that wait for their clients in this process.
        num_cut: Connections that were cut because their clients read nothing.
    """

    num_sequences: int = 0
    num_bytes: int = 0
    num_cut: int = 0


def unread_families(view: UnreadView) -> Iterator[Any]:
    """Gauges of what waits, and a counter of those who did not come for it."""
    text = "Sequences that have ended and are not read to their end; they take room in the queue."
    yield GaugeMetricFamily("peft_dist:sequences_unread", text, value=view.num_sequences)
    text = "Bytes of answers that wait in this process for their clients to read."
    yield GaugeMetricFamily("peft_dist:unsent_bytes", text, value=view.num_bytes)
    text = "Connections that were cut because their clients read nothing."
    yield CounterMetricFamily("peft_dist:clients_cut", text, value=view.num_cut)
