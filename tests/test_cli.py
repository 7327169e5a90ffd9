"""``peft-dist`` itself: its version, its help, and how else it is started."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_dist import __version__
from peft_dist.cli import app, serve
from peft_dist.cli_admin import rolling_restart
from peft_dist.cli_help import PANEL_OF
from peft_dist.core.errors import ConfigError, PeftDistError

ROOT = Path(__file__).parents[1]
HIDDEN = {"launcher", "replica_factory"}


@pytest.mark.parametrize("argument", ["--version", "version"])
def test_it_tells_its_version(argument: str) -> None:
    result = CliRunner().invoke(app, [argument])
    assert (result.exit_code, result.output) == (0, f"{__version__}\n")


def test_the_package_can_be_run() -> None:
    command = [sys.executable, "-m", "peft_dist", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def test_help_begins_with_what_is_needed_first() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    names = [words[1] for line in output.splitlines() if (words := line.split()) and words[0] == "│" and len(words) > 2]
    assert [name for name in names if name in ("serve", "worker", "bench", "version")] == [
        "serve",
        "worker",
        "bench",
        "version",
    ]


def test_every_option_of_serve_has_its_panel() -> None:
    options = set(inspect.signature(serve).parameters) - {"model"} - HIDDEN
    assert options == set(PANEL_OF)


def test_help_of_serve_shows_the_panels() -> None:
    output = CliRunner().invoke(app, ["serve", "--help"]).output
    assert [panel for panel in PANEL_OF.values() if panel not in output] == []
    assert "--launcher" not in output


def test_a_rolling_restart_names_what_is_wrong_with_the_address() -> None:
    with pytest.raises(ConfigError, match="'localhost:8000' is no URL: write for example http"):
        rolling_restart("localhost:8000")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        # The address that clients of the API are given is as good.
        with pytest.raises(
            PeftDistError, match=rf"{url}/admin/rolling-restart cannot be asked \(.*refused\): is the server"
        ):
            rolling_restart(f"{url}/v1")
