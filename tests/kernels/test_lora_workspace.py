"""How long the memory of rank intermediates is kept: as long as a graph may write to it."""

from __future__ import annotations

import weakref

import pytest
import torch

from peft_dist.kernels.lora_workspace import LoRAWorkspace


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> LoRAWorkspace:
    """On a CPU, whose captures the tests say."""
    made = LoRAWorkspace("cpu")
    made.device = torch.device("cuda")
    for make in ("empty", "zeros"):
        on_cpu = getattr(torch, make)
        monkeypatch.setattr(torch, make, lambda *size, on_cpu=on_cpu, **options: on_cpu(*size, dtype=options["dtype"]))
    capture(monkeypatch, False)
    return made


def capture(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answer)


def test_what_no_graph_was_captured_with_goes_when_it_is_outgrown(workspace: LoRAWorkspace) -> None:
    for count in (10, 100, 1000):
        assert workspace.take(count).numel() == count and workspace.take(0).numel() == count
        assert workspace.num_bytes == 4 * count
    assert not workspace.take_counters(5).any() and workspace.num_bytes == 4 * 1005


def test_what_graphs_write_to_stays_until_they_are_gone(
    workspace: LoRAWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.take(10)
    capture(monkeypatch, True)
    kept, counters = weakref.ref(workspace.take(10)), weakref.ref(workspace.take_counters(4))
    capture(monkeypatch, False)
    # The next one is of no graph yet, and goes when it is outgrown.
    for count in (100, 1000):
        assert workspace.take(count).numel() == count
        assert workspace.num_bytes == 4 * (10 + 4 + count)
    assert workspace.take_counters(8).numel() == 8 and workspace.num_bytes == 4 * (10 + 4 + 8 + 1000)
    assert kept() is not None and counters() is not None
    workspace.forget_graphs()
    assert workspace.num_bytes == 4 * (8 + 1000) and kept() is None and counters() is None


def test_what_graphs_that_are_gone_wrote_to_goes_when_it_is_outgrown(
    workspace: LoRAWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an adapter of more ranks comes: steps are dropped, and those that follow need more."""
    capture(monkeypatch, True)
    workspace.take(10)
    capture(monkeypatch, False)
    workspace.forget_graphs()
    assert workspace.take(20).numel() == 20 and workspace.num_bytes == 4 * 20
