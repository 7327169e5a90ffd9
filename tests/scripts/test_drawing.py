"""What stands above a picture of a figure."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments import drawing, fig09_end_to_end, tables


@pytest.mark.parametrize(
    ("abouts", "words"),
    [
        ([{"mode": "live", "scale": "tiny", "seed": 1, "data": {"maf1": "d01.csv", "lengths": "synthetic"}}],
         "live, model not told, device not told, scale tiny, seed 1, maf1 d01.csv, lengths synthetic"),
        ([{"mode": "simulated", "data": {"maf1": "synthetic", "maf2": "synthetic"}}] * 2, "simulated, data synthetic"),
        ([{"data": {"maf1": "synthetic", "maf2": "synthetic (fitted to 2019's)"}}],
         "data synthetic, maf2 fitted to 2019's"),
        ([{"mode": "trace", "data": "synthetic, fitted"}, {}], "trace, data synthetic"),
        ([{"mode": "measured", "device": "cpu"}, {"mode": "live"}],
         "measured, device cpu\nlive, model not told, device not told"),
        ([{"mode": "simulated", "scale": "tiny", "correlated": False, "rate_factor": 1.0, "max_total": None}],
         "simulated, scale tiny"),
        ([{"mode": "simulated", "seed": 0, "correlated": True, "rate_factor": 0.5, "max_total": 512}],
         "simulated, seed 0, correlated, rate factor 0.5, at most 512 tokens"),
        ([{"mode": "live", "scale": "tiny", "servers": {"a": {"model": "m", "device": "H"}, "b": {"model": "m"}}}],
         "live, model m, device H and not told, scale tiny"),
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


def test_figure_9_has_a_panel_for_what_was_run_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"system": "dlora", "rate": rate, "avg_lat": 0.1, "replicas": 8} for rate in (1, 40)]
    for panel in ("maf2_70b", "maf1_7b"):
        tables.write_csv(tmp_path / f"fig9_{panel}.csv", ["system"], rows)
    drawn = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda one, *more: (drawn.append(one), save(one, *more)))
    fig09_end_to_end.draw(tmp_path)
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == ["MAF1, 7b, replicas: 8", "MAF2, 70b, replicas: 8"]
    labels = drawn[0].legends[0].get_texts()
    assert [text.get_text() for text in labels] == ["dLoRA", "objective, 0.5 s/token"]
    assert (tmp_path / "figure9.png").exists()
