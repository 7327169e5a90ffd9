"""Overload by clients that read nothing: others get 429, what is kept is bounded, and they are cut off in time."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_serve import Server, serving
from tests.worker.fake_replica import expected_token

NUM_STALLED = 7
NUM_TOKENS = 3000
# All of them have to be admitted before the first is cut off.
TIMEOUT = 6.0
# What uvicorn takes in before it makes a writer wait, and what is written at once.
MOST_UNSENT = (64 << 10) + 64 * 400
FACTORY = ["--replica-factory", "tests.worker.fake_replica:build_long", "--served-model-name", "tiny"]
OPTIONS = ["--max-num-seqs", "4", "--max-queue", "4", "--unread-timeout", str(TIMEOUT)]


def body(number: int) -> dict[str, object]:
    sampling = {"max_tokens": NUM_TOKENS, "seed": number, "return_token_ids": True}
    return {"model": "tiny", "prompt": [5, number], "stream": True, **sampling}


@contextmanager
def asked(server: Server, content: dict[str, object]) -> Iterator[socket.socket]:
    """A connection over which something was asked for, and of which nothing was read."""
    port = int(server.port_file.read_text())
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        connection.connect(("127.0.0.1", port))
        text = json.dumps(content).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        yield connection


def metric(text: str, name: str) -> float:
    found = re.search(rf"^peft_dist:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


class SlowReader(threading.Thread):
    """Reads a stream so slowly that it takes longer than a client may read nothing."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._pause = threading.Event()
        self.text = b""

    def run(self) -> None:
        end = time.monotonic() + 1.5 * TIMEOUT
        while part := self._connection.recv(1 << 12):
            self.text += part
            if time.monotonic() < end:
                self._pause.wait(0.1)

    def tokens(self) -> list[int]:
        events = re.findall(rb"^data: (\{.*\})\r?$", self.text, re.MULTILINE)
        return [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["one", "several"])
def test_clients_that_read_nothing_fill_the_queue_and_no_more(prompts: str, tmp_path: Path) -> None:
    """Each prompt of a body is a sequence of its own, whose tokens come by another way than those of one alone."""
    with serving(tmp_path, *FACTORY, *OPTIONS) as server, ExitStack() as stack:
        if prompts == "one":
            for number in range(NUM_STALLED):
                stack.enter_context(asked(server, body(number)))
        else:
            several = {**body(0), "prompt": [[5, number] for number in range(NUM_STALLED)]}
            stack.enter_context(asked(server, several))
        reader = SlowReader(stack.enter_context(asked(server, body(99))))
        reader.start()
        num_refused, most_unread = 0, 0.0
        with httpx.Client(base_url=server.url, timeout=100) as http:
            server.until(lambda: metric(http.get("/metrics").text, "sequences_admitted_total") == NUM_STALLED + 1)
            while not metric(text := http.get("/metrics").text, "clients_cut_total"):
                refused = http.post("/v1/completions", json=body(7))
                num_refused += refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
                assert refused.status_code == 429 or metric(http.get("/metrics").text, "clients_cut_total")
                most_unread = max(most_unread, metric(text, "sequences_unread"))
                assert metric(text, "unsent_bytes") <= (NUM_STALLED + 1) * MOST_UNSENT
            # All of them ended long before: they took room because nobody had read them.
            assert num_refused and most_unread >= NUM_STALLED
            num_cut = NUM_STALLED if prompts == "one" else 1
            server.until(lambda: metric(http.get("/metrics").text, "clients_cut_total") == num_cut)
            reader.join(60)
            assert reader.tokens() == [expected_token(99, 0, k, "") for k in range(NUM_TOKENS)], "it was slow, no more"
            names = ("sequences_unread", "requests_running", "unsent_bytes")
            server.until(lambda: not any(metric(http.get("/metrics").text, name) for name in names))
            assert metric(http.get("/metrics").text, "clients_cut_total") == num_cut
            answer = http.post("/v1/completions", json={**body(7), "stream": False, "max_tokens": 3})
            assert answer.status_code == 200
        assert server.log.count("has read nothing for") == num_cut
        assert server.stop() == 0 and "Traceback" not in server.log
