"""What is known to be wrong before a model is loaded; files that may be open."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from peft_dist import cli_checks, cli_worker
from peft_dist.cli_checks import check_adapters, check_decision_log, check_gpus, check_names
from peft_dist.cli_options import of_text
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import AdapterError, ConfigError
from peft_dist.placement.triggers import TriggerSettings
from peft_dist.worker.joining import JoinSettings
from tests.e2e.test_serve import Server

_CHECK = """
import logging, resource
from peft_dist import cli_checks, cli_worker
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


def test_replicas_that_would_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(cli_checks, "version", lambda name: "2.13.0")
    for replicas, size, share in ((3, 1, 0.9), (1, 2, 0.9), (6, 1, 0.5), (2, 2, 0.45), (1, 4, 0.9)):
        check_gpus(replicas, EngineConfig("m", tensor_parallel_size=size, gpu_memory_utilization=share))
    check_gpus(8, EngineConfig("m", device="cpu"))
    check_gpus(8, EngineConfig("m", num_blocks=100))
    for sharers in range(2, 40):  # What is advised is taken.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with pytest.raises(ConfigError, match="at most") as caught:
            check_gpus(sharers, EngineConfig("m", device="cuda"))
        share = float(str(caught.value).rpartition(" ")[2])
        check_gpus(sharers, EngineConfig("m", device="cuda", gpu_memory_utilization=share))
    for hidden in ("-1", "", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        check_gpus(8, EngineConfig("m", device="cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(cli_checks, "version", lambda name: "2.13.0+cpu")
    check_gpus(8, EngineConfig("m"))
    monkeypatch.setattr(cli_checks, "version", lambda name: "2.13.0")
    with pytest.raises(ConfigError, match=r"2 on one GPU .* lower --replicas to 3, or --gpu-memory-utilization to at"):
        check_gpus(4, EngineConfig("m"))
    with pytest.raises(ConfigError, match=r"of 2 GPU\(s\) each .* lower --replicas to 1.* at most 0\.33"):
        check_gpus(3, EngineConfig("m", tensor_parallel_size=2, gpu_memory_utilization=0.5))


def test_triggers_from_text() -> None:
    found = of_text(TriggerSettings, "--migration-triggers", "period=2, kv_share=0.5")
    assert found == TriggerSettings(period=2.0, kv_share=0.5)
    assert of_text(TriggerSettings, "--migration-triggers", "") == TriggerSettings()
    for text, words in (
        ("perod=3", "there is no 'perod', but period"),
        ("period", "write period=10"),
        ("pause=x", "pause=1"),
        ("pause=1,pause=2", "twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            of_text(TriggerSettings, "--migration-triggers", text)


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


def test_a_host_that_joins_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[JoinSettings] = []

    async def join(settings: JoinSettings) -> None:
        asked.append(settings)

    monkeypatch.setattr(cli_worker, "run_worker", join)
    cli_worker.worker(
        "tcp://host:1", num_blocks=7, gpu_memory_utilization=0.4, adapter_host_memory="1GiB", device="cpu"
    )
    settings = asked[0]
    has = {"num_blocks": 7, "gpu_memory_utilization": 0.4, "adapter_host_memory": 1 << 30, "device": "cpu"}
    assert settings.engine == has
    cli_worker.worker("tcp://host:1", gpu_memory_utilization=0.4)
    assert asked[1].engine == {"gpu_memory_utilization": 0.4, "num_blocks": None}, "not the server's number"
