"""Adapters come, change and go under traffic: no request fails, and no token is of other weights than asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapter_traffic import NUM_CALLS, NUM_CONTENTS, ROOT, SETTINGS, compare, run

torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "num_copies", "options"), SETTINGS)
def test_three_hundred_calls_under_traffic(
    depth: int,
    num_copies: int,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    world, oracle = run(tmp_path, depth, num_copies, options)
    assert world.errors == [] and sum(world.calls.values()) == NUM_CALLS
    assert world.num_overwritten, "no files were overwritten while requests ran on them"
    found = compare(world, oracle)
    assert found["wrong_tokens"] == 0
    contents = {world.numbers[content_hash] for content_hash, _, _ in world.answers}
    assert found["answers"] >= NUM_CALLS // 2 and len(contents) == NUM_CONTENTS
    world.numbers = {key: max(number, 0) ^ 1 for key, number in world.numbers.items()}
    assert compare(world, oracle)["wrong_tokens"], "the comparison would not have noticed"
    with capsys.disabled():
        print(f"\n{world.calls}, {world.num_overwritten} over files in use, {found}")
