"""What is told of a live server: what it says itself, and what it is said to be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from experiments import here, served, settings

from peft_dist.core.errors import ConfigError

OURS = {"id": "tiny", "root": "/models/llama-7b", "parent": None, "max_model_len": 512}
ADAPTER = {"id": "sql", "root": "/adapters/sql", "parent": "tiny"}


@contextmanager
def answering(pages: Mapping[str, object]) -> Iterator[str]:
    """A server of these pages."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(json.dumps(pages.get(self.path)).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def pages(*models: Mapping[str, object], **more: object) -> dict[str, object]:
    return {"/v1/models": {"data": models}, "/health": {"replicas": {"0": "ready", "1": "ready"}}} | {
        f"/{name}": value for name, value in more.items()
    }


@pytest.mark.parametrize(
    ("card", "model"),
    [
        (OURS, "llama-7b"),
        ({**OURS, "root": "org/model"}, "org/model"),
        ({**OURS, "root": None}, "tiny"),
        ({"id": "other"}, "other"),
    ],
)
def test_a_server_tells_its_model_and_version(card: dict[str, object], model: str) -> None:
    """Whichever server it is; of a folder its name alone."""
    with answering(pages(ADAPTER, card, version={"version": "1.2"})) as url:
        found = served.told(url)
    assert found["model"] == model and found["versions"] == {"server": "1.2"}
    assert (found["replicas"], found["device"]) == (2, None)


def test_what_it_does_not_tell_is_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(pages(OURS, ADAPTER)) as url:
        found = served.told(url, '{"device": "NVIDIA H200", "versions": {"torch": "2"}, "options": "--dtype bfloat16"}')
        asked = ["--server", url, "--systems", "fcfs"]
        chosen = settings.settings(settings.parser(None).parse_args([*asked, "--server-told", '{"device": "a CPU"}']))
        assert not capsys.readouterr().err
        settings.settings(settings.parser(None).parse_args(asked))
    assert found["device"] == "NVIDIA H200" and found["versions"] == {"torch": "2"}
    assert (chosen.model, chosen.replicas, chosen.served["device"]) == ("llama-7b", 2, "a CPU")
    assert "warning: nothing tells the server's device: --server-told" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "told", "words"),
    [
        ([OURS], "{", r"--server-told '\{' is no JSON"),
        ([OURS], "[1]", r"--server-told '\[1\]' is no JSON object"),
        ([ADAPTER], None, "tells of no model without a parent"),
    ],
)
def test_what_tells_nothing_is_refused(models: list[dict[str, object]], told: str | None, words: str) -> None:
    with answering(pages(*models)) as url, pytest.raises(ConfigError, match=words):
        served.told(url, told)


def test_a_server_of_this_machine_is_described_by_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU, unless it is told to compute on the CPU."""
    about = {"date": "today", "cpu": "a CPU", "cores": 2, "gpu": "a GPU", "torch": "2"}
    monkeypatch.setattr(here, "environment_apart", lambda: about)
    on_cpu = ("--device cpu --max-loras 8", "--device=cpu")
    for serve, device in (("--max-loras 8", "a GPU"), *((one, "a CPU") for one in on_cpu)):
        assert json.loads(here.told(serve)) == {"device": device, "versions": {"torch": "2"}, "options": serve}
