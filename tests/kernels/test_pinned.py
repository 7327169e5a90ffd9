"""Host memory that is locked for a GPU after it was written, and unlocked before it goes back."""

from __future__ import annotations

import gc

import pytest
import torch

from peft_dist.kernels import pinned
from peft_dist.kernels.pinned import HostBuffer


class Cudart:
    """Stands in for CUDA's runtime."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[str, int, int]] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("lock", address, size))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unlock", address, 0))
        return 0


def buffer_with(cudart: Cudart, size: int, monkeypatch: pytest.MonkeyPatch) -> HostBuffer:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return HostBuffer(size)


def test_it_is_unlocked_with_the_last_view(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart()
    buffer = buffer_with(cudart, 4096, monkeypatch)
    assert not buffer.tensor.any() and buffer.tensor.shape == (4096,)
    buffer.lock()
    address, view = buffer.tensor.data_ptr(), buffer.tensor[100:200].view(torch.int32)
    del buffer
    gc.collect()
    assert cudart.calls == [("lock", address, 4096)]
    view.fill_(7)
    del view
    gc.collect()
    assert cudart.calls[1:] == [("unlock", address, 0)]


def test_what_was_never_locked_is_not_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart()
    buffer = buffer_with(cudart, 10, monkeypatch)
    del buffer
    gc.collect()
    assert not cudart.calls


def test_what_cannot_be_locked_says_so_and_is_not_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = Cudart(code=2)
    buffer = buffer_with(cudart, 4096, monkeypatch)
    with pytest.raises(RuntimeError, match=r"4096 bytes.*error 2.*--adapter-host-memory"):
        buffer.lock()
    del buffer
    gc.collect()
    assert [name for name, *_ in cudart.calls] == ["lock"]


def test_a_system_without_large_pages_has_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(pinned._Pages):
        def madvise(self, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pinned, "_Pages", Refusing)
    assert HostBuffer(4096).tensor.shape == (4096,)


def test_nothing_may_be_locked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = buffer_with(Cudart(), 0, monkeypatch)
    assert buffer.tensor.shape == (0,)
    buffer.lock()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_from_it_and_it_can_be_had_again() -> None:
    for _ in range(20):
        buffer = HostBuffer(8 << 20)
        buffer.tensor.random_(0, 255)
        assert not buffer.tensor.is_pinned()
        buffer.lock()
        assert buffer.tensor[100:].is_pinned()
        there = buffer.tensor.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(there.cpu(), buffer.tensor)
