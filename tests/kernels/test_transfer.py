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


def equal_copies(moved: Moved, tensors: list[torch.Tensor]) -> bool:
    assert len(moved.addresses) == len(tensors)
    for address, tensor in zip(moved.addresses.tolist(), tensors, strict=True):
        copy = torch.frombuffer((ctypes.c_char * tensor.nbytes).from_address(address), dtype=torch.uint8)
        if address == tensor.data_ptr() or not torch.equal(copy, tensor.contiguous().view(torch.uint8).flatten()):
            return False
    return True


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


def test_beside_what_is_turned_all_are_moved_by_themselves() -> None:
    buffer, copies = torch.randn(1000), Copies()
    plain, turned, other = views(buffer, [(4, 30), (5, 6), (7, 2)])
    tensors = [plain, turned.T, other]
    assert equal_copies(move_together(tensors, copies), tensors)
    assert copies.num_bytes == [480, 120, 56]


def test_tensors_of_two_buffers_are_moved_by_themselves() -> None:
    copies = Copies()
    tensors = [*views(torch.randn(200), [(4, 30)]), *views(torch.randn(200), [(5, 6), (2, 2)])]
    assert equal_copies(move_together(tensors, copies), tensors)
    assert copies.num_bytes == [480, 120, 16]


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
