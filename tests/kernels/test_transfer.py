"""Tensors that share a buffer are moved with it, and come out as they were."""

from __future__ import annotations

import ctypes

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.transfer import Moved, move_together

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


class Copies:
    """Counts the calls that a copy to a device would take."""

    def __init__(self) -> None:
        self.num_bytes: list[int] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_bytes.append(tensor.nbytes)
        return tensor.clone()


def tensor_at(moved: Moved, like: torch.Tensor) -> torch.Tensor:
    memory = (ctypes.c_char * like.nbytes).from_address(moved.address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, moved.strides)


def equal_copies(moved: list[Moved], tensors: list[torch.Tensor]) -> bool:
    return len(moved) == len(tensors) and all(
        torch.equal(tensor_at(a, b).contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        and a.address != b.data_ptr()
        for a, b in zip(moved, tensors, strict=True)
    )


def views(buffer: torch.Tensor, shapes: list[tuple[int, int]], gap: int = 0) -> list[torch.Tensor]:
    found, start = [], 3
    for rows, columns in shapes:
        found.append(buffer[start : start + rows * columns].view(rows, columns))
        start += rows * columns + gap
    return found


def test_an_adapter_in_one_buffer_is_one_copy() -> None:
    buffer, copies = torch.randn(1000).to(torch.bfloat16), Copies()
    tensors = views(buffer, [(4, 30), (30, 4), (1, 7), (16, 16)])
    assert equal_copies(move_together(tensors, copies), tensors)
    # From a multiple of 16 bytes on.
    assert copies.num_bytes == [sum(tensor.nbytes for tensor in tensors) + 6]


def test_little_of_a_large_buffer_is_not_moved_with_all_of_it() -> None:
    buffer, copies = torch.randn(10_000), Copies()
    tensors = views(buffer, [(4, 30), (30, 4)], gap=5000)
    assert equal_copies(move_together(tensors, copies), tensors)
    assert copies.num_bytes == [480, 480]


def test_what_is_turned_is_moved_by_itself() -> None:
    buffer, copies = torch.randn(1000), Copies()
    plain, turned, other = views(buffer, [(4, 30), (5, 6), (7, 2)])
    tensors = [plain, turned.T, other]
    assert equal_copies(move_together(tensors, copies), tensors)
    assert sorted(copies.num_bytes) == [120, 56 + 120 + 480 + 12]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(DTYPES), st.integers(1, 9), st.integers(1, 9), st.integers(0, 40)),
        max_size=12,
    )
)
def test_any_tensors_of_any_buffers(asked: list[tuple[int, torch.dtype, int, int, int]]) -> None:
    buffers = [torch.randint(0, 255, (4096,), dtype=torch.uint8) for _ in range(3)]
    starts, tensors = [0, 0, 0], []
    for which, dtype, rows, columns, gap in asked:
        start = -(-(starts[which] + gap) // dtype.itemsize) * dtype.itemsize
        starts[which] = start + rows * columns * dtype.itemsize
        tensors.append(buffers[which][start : starts[which]].view(dtype).view(rows, columns))
    copies = Copies()
    assert equal_copies(move_together(tensors, copies), tensors)
    assert len(copies.num_bytes) <= len(tensors)
