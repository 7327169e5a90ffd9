"""What is known to be wrong before a model is loaded; files that may be open."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from peft_dist.cli_checks import check_adapters, check_decision_log, check_names
from peft_dist.core.errors import AdapterError, ConfigError
from tests.e2e.test_serve import Server

_CHECK = """
import logging, resource
from peft_dist.cli_checks import check_file_limit
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
check_file_limit({requests})
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_names_that_hide_one_another() -> None:
    check_names([("a", "x"), ("b", "x")], ("base", "other"))
    with pytest.raises(ConfigError, match="'a' twice"):
        check_names([("a", "x"), ("a", "y")], ("base",))
    with pytest.raises(ConfigError, match="'other', which is the base model's name"):
        check_names([("a", "x"), ("other", "y")], ("base", "other"))


def test_a_folder_of_adapters_is_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="give the folder that PEFT's save_pretrained wrote"):
        check_adapters([("a", str(tmp_path))])
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        AdapterError, match="it holds sql, which have: name one of them, or serve all with --adapter-dir"
    ):
        check_adapters([("a", str(tmp_path))])
    check_adapters([("a", str(tmp_path / "sql")), ("b", "org/name")])


def test_a_decision_log_that_nobody_could_write(tmp_path: Path) -> None:
    check_decision_log(None)
    check_decision_log(str(tmp_path / "log"))
    with pytest.raises(ConfigError, match=r"--decision-log .*there is no folder .*nowhere, make it first"):
        check_decision_log(str(tmp_path / "nowhere" / "log"))


@pytest.mark.parametrize(
    ("soft", "hard", "requests", "after", "words"),
    [
        (256, 4096, 1280, 4096, ""),
        (4096, 4096, 1280, 4096, ""),
        (256, 1024, 1280, 1024, "1024 files may be open, and each of up to 1280 requests is a connection"),
    ],
)
def test_the_limit_is_raised_and_too_low_a_one_is_told(
    soft: int, hard: int, requests: int, after: int, words: str
) -> None:
    code = _CHECK.format(soft=soft, hard=hard, requests=requests)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [str(after), str(hard)]
    assert words in answer.stderr if words else not answer.stderr


def test_more_clients_are_answered_than_a_process_may_have_files_at_first(tmp_path: Path) -> None:
    """They would wait, for as long as others are connected."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    try:
        server = Server(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with ExitStack() as stack:
        stack.callback(server.process.wait)
        stack.callback(server.process.kill)
        server.until(server.port_file.exists)
        port = int(server.port_file.read_text())
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 200"
        assert server.stop() == 0
