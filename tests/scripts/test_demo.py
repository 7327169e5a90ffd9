"""The demo leaves the tree as git knows it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import demo
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_picture_lies_where_git_ignores_it() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    picture = demo.parse([]).picture
    assert picture.is_relative_to(ROOT)
    assert subprocess.run(["git", "check-ignore", "--quiet", str(picture)], cwd=ROOT).returncode == 0


def test_the_readmes_picture_is_asked_for() -> None:
    assert demo.parse(["--picture", "docs/demo.svg"]).picture == Path("docs/demo.svg")
