"""How fast a replica is by whose requests it has."""

from __future__ import annotations

import pytest

from peft_dist.policy.merging import merged_share, own_slowdown, slowdown
from peft_dist.policy.settlement import interruption_price

RATIO = 15 / 27


def test_one_adapter_alone_is_always_merged_and_one_of_many_never() -> None:
    assert merged_share(1.0, RATIO) == 1.0 and slowdown(8, 8, 16, RATIO) == RATIO
    assert merged_share(0.5, RATIO) == 0.0 and slowdown(8, 16, 16, RATIO) == 1.0
    assert merged_share(1.0, 1.0) == 0.0 and slowdown(8, 8, 16, 1.0) == 1.0 and slowdown(0, 0, 16, RATIO) == 1.0


@pytest.mark.parametrize(("share", "part"), [(0.7, 1 / 6), (0.9, 1 / 2), (0.97, 2 / 3)])
def test_between_them_for_the_part_that_credits_lead_to(share: float, part: float) -> None:
    found = merged_share(share, RATIO)
    assert found == pytest.approx(part, abs=0.05)
    # There income and expenses meet: 1 - h a merged second, the price an unmerged one.
    assert (1 - share) * found == pytest.approx(interruption_price(share, RATIO) * (1 - found))


def test_no_other_part_has_a_smaller_mean() -> None:
    share, gain = 0.9, 1 / RATIO - 1

    def mean(part: float) -> float:
        return share / (1 + gain * part) + (1 - share) / (1 - part)

    best = merged_share(share, RATIO)
    assert mean(best) == min(mean(best), *(mean(part / 100) for part in range(100)))
    assert slowdown(9, 10, 10, RATIO) == pytest.approx(mean(best))


def test_each_more_of_the_leader_makes_it_faster_and_each_other_one_slower() -> None:
    values = [slowdown(n, 16, 16, RATIO) for n in range(9, 17)]
    assert values == sorted(values, reverse=True) and values[0] > 0.999 and values[-1] == RATIO
    assert own_slowdown(15, 16, RATIO, leads=True) < 1 < own_slowdown(15, 16, RATIO, leads=False)
    # Beyond the seats whole batches of the leader run merged while others wait.
    assert slowdown(24, 32, 16, RATIO) < slowdown(12, 16, 16, RATIO)
