"""The demo's model and adapters for real (make test-slow): downloads and converts the model if the cache lacks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_answers_are_pefts(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_exactness.py"), "--prompts", "10", "--tokens", "24"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
