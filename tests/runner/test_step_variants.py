"""Which sizes steps are captured in."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from peft_dist.runner.step_variants import decode_sizes


@given(st.integers(1, 5000), st.data())
@example(1024, None).via("a batch of 513 ran in 1,024 rows")
def test_decodes_are_padded_by_three_rows_or_an_eighth(most: int, data: st.DataObject | None) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    count = data.draw(st.integers(1, most)) if data is not None else 513
    padding = next(size for size in sizes if size >= count) - count
    assert padding <= (3 if count <= 64 else count / 8)


@given(st.integers(1, 5000))
def test_few_sizes_are_captured(most: int) -> None:
    """Each takes memory, and 0.1 s and more at the start: twice the sequences are 8 sizes more."""
    sizes = decode_sizes(most)
    assert len(sizes) <= len(decode_sizes(512)) + 1 + sum(8 for first in (512, 1024, 2048, 4096) if most > first)
    assert set(decode_sizes(most)[:-1]) <= set(decode_sizes(2 * most))
