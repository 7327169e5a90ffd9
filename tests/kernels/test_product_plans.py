"""Plans of products that are measured once, and kept on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from peft_dist.kernels.product_plans import ProductKey, ProductPlan, ProductPlans, shipped_plans

KEY = ProductKey(32, 64, (16, 16), "bfloat16", gated=True, few=False)
ADAPTED = KEY._replace(slots=7, max_rank=64)
ABOUT = {"device": "a card", "torch": "2"}


def never() -> ProductPlan | None:
    pytest.fail("measured what is known, or not to be measured")


def measured(path: Path | None, about: dict[str, str] = ABOUT) -> ProductPlans:
    plans = ProductPlans(path, about)
    with plans.measuring():
        assert plans.find(KEY, lambda: ProductPlan("library", 24)) == ("library", 24)
        assert plans.find(ADAPTED, lambda: ProductPlan("beside", 8)) == ("beside", 8)
    return plans


def test_what_is_not_known_is_measured_once_and_only_when_told_to() -> None:
    plans = ProductPlans()
    assert plans.find(KEY, never) is None
    with plans.measuring():
        assert plans.find(ADAPTED, lambda: None) is None
        assert plans.find(ADAPTED, never) is None, "what cannot be measured was tried again"
        assert plans.find(KEY, lambda: ProductPlan("kernel")) == ("kernel", 0)
        assert plans.find(KEY, never) == ("kernel", 0)
        plans.stop_measuring()
        assert plans.find(KEY._replace(rows=1), never) is None
    assert plans.find(KEY, never) == plans.known(KEY) == ("kernel", 0)
    assert plans.find(ADAPTED, never) is None and plans.known(ADAPTED) is None


def test_another_process_finds_them_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "products" / "card.json"
    measured(path)
    found = ProductPlans(path, ABOUT)
    assert found.find(KEY, never) == ("library", 24) and found.find(ADAPTED, never) == ("beside", 8)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_others_wrote_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    early = ProductPlans(path, ABOUT)
    measured(path)
    other = KEY._replace(rows=1)
    with early.measuring():
        early.find(other, lambda: ProductPlan("library"))
    late = ProductPlans(path, ABOUT)
    assert late.find(KEY, never) and late.find(other, never)


def test_those_of_another_card_or_library_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    measured(path)
    assert ProductPlans(path, {**ABOUT, "torch": "3"}).find(KEY, never) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("plans"),
        lambda content: content["plans"][0].pop("rows"),
        lambda content: content["plans"][0].update(way="guessed"),
        lambda content: content["plans"][0].update(spared=-8),
        lambda content: content["plans"][0].update(out_features=3),
    ],
)
def test_a_broken_file_is_named_and_measured_anew(
    tmp_path: Path, change: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "card.json"
    measured(path)
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, logger="peft_dist"):
        assert ProductPlans(path, ABOUT).find(KEY, never) is None
    assert str(path) in caplog.text
    measured(path)
    assert ProductPlans(path, ABOUT).find(KEY, never) == ("library", 24)


def test_a_folder_that_cannot_be_entered_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    assert ProductPlans(tmp_path / "card.json", ABOUT).known(KEY) is None


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="peft_dist"):
        plans = measured(tmp_path / "file" / "card.json")
    assert "cannot be written" in caplog.text and plans.find(KEY, never) == ("library", 24)


def test_those_that_came_with_the_program_are_known_where_they_are_about_the_same(tmp_path: Path) -> None:
    shipped, own = tmp_path / "shipped.json", tmp_path / "own.json"
    measured(shipped)
    same = ProductPlans(own, ABOUT, shipped)
    with same.measuring():
        assert same.find(KEY, never) == ("library", 24)
    other = ProductPlans(own, {**ABOUT, "torch": "3"}, shipped)
    assert other.known(KEY) is None and other.guess(KEY) == ("library", 24)
    with other.measuring():
        assert other.find(KEY, lambda: ProductPlan("library", 8)) == ("library", 8)
    assert other.guess(KEY) == ("library", 8)
    assert ProductPlans(own, {**ABOUT, "torch": "3"}, shipped).known(KEY) == ("library", 8)


def test_what_came_with_the_program_is_not_kept_as_measured_here(tmp_path: Path) -> None:
    """A later version's may be better."""
    shipped, own = tmp_path / "shipped.json", tmp_path / "own.json"
    measured(shipped)
    plans, other = ProductPlans(own, ABOUT, shipped), KEY._replace(rows=1)
    with plans.measuring():
        plans.find(other, lambda: ProductPlan("kernel"))
    alone = ProductPlans(own, ABOUT)
    assert alone.known(other) == ("kernel", 0) and alone.known(KEY) is None


def test_a_pool_of_another_size_takes_the_nearest() -> None:
    plans = ProductPlans()
    with plans.measuring():
        for slots in (1, 4):
            plans.find(ADAPTED._replace(slots=slots), lambda slots=slots: ProductPlan("beside", slots))  # type: ignore[misc]
    assert plans.guess(ADAPTED._replace(slots=2, max_rank=16)) == ("beside", 1)
    assert plans.guess(ADAPTED._replace(slots=1000)) == ("beside", 4)
    assert plans.guess(ADAPTED._replace(rows=1)) is None and plans.guess(KEY) is None


def test_a_pool_is_measured_once_for_all_whose_batches_hold_no_more_adapters() -> None:
    """Any two pools of 32 adapters and more are timed alike; one of fewer says nothing about 32 in a batch."""
    plans = ProductPlans()
    with plans.measuring():
        plans.find(ADAPTED._replace(slots=4), lambda: ProductPlan("inside"))
        assert plans.known(ADAPTED._replace(slots=32)) is None
        plans.find(ADAPTED._replace(slots=32), lambda: ProductPlan("beside", 32))
        for slots in (8, 40, 1000):
            assert plans.find(ADAPTED._replace(slots=slots, max_rank=16), never) == ("beside", 32)
        for slots in (3, 4):
            assert plans.find(ADAPTED._replace(slots=slots), never) == ("inside", 0)


def test_what_is_shipped_can_be_read() -> None:
    found = sorted(shipped_plans("").parent.glob("products-*.json"))
    assert found
    for path in found:
        about = json.loads(path.read_text())["about"]
        assert path == shipped_plans(about["device"])
        plans = ProductPlans(None, about, path)
        key = ProductKey(256, 4096, (4096,), "bfloat16", gated=False, few=False)
        assert plans.known(key) is not None and plans.guess(key._replace(slots=16, max_rank=64)) is not None
