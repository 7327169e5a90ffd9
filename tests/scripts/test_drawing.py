"""What stands above a picture of a figure."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments import drawing, tables


@pytest.mark.parametrize(
    ("abouts", "words"),
    [
        ([{"mode": "live", "scale": "tiny", "seed": 1, "data": {"maf1": "d01.csv", "lengths": "synthetic"}}],
         "live, scale tiny, seed 1, maf1 d01.csv, lengths synthetic"),
        ([{"mode": "simulated", "data": {"maf1": "synthetic", "maf2": "synthetic"}}] * 2, "simulated, data synthetic"),
        ([{"mode": "trace", "data": "synthetic, fitted"}, {}], "trace, data synthetic"),
        ([{"mode": "measured", "device": "cpu"}, {"mode": "live"}], "measured, device cpu\nlive"),
        ([{}], ""),
    ],
)  # fmt: skip
def test_a_picture_says_what_it_is_of(abouts: list[dict[str, object]], words: str, tmp_path: Path) -> None:
    for number, about in enumerate(abouts):
        tables.write_json(tmp_path / f"{number}.json", about)
    drawn = drawing.figure(2, 2)
    drawing.save(drawn, tmp_path, "picture", [str(number) for number in range(len(abouts) + 1)])
    assert drawn.get_suptitle() == words
    assert (tmp_path / "picture.pdf").exists() and (tmp_path / "picture.png").exists()
