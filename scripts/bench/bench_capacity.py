"""How many tokens a second the orchestrator can pass on, and how long each is under way.

    python scripts/bench/bench_capacity.py [--rates 10000 25000 40000 80000] [--seconds 15] [--repeats 3]

`peft-dist serve` as it is, with one replica whose engine draws known tokens of SmolLM2's tokenizer at a set rate
(capacity_worker.py: a real worker process on the real socket) and a client process (capacity_client.py) with one
connection for each stream, half of them chats and half completions. A step's tokens go out at once, so the last of a
step waits for all others. Added latency is the time from a step's end in the worker to the return of the client's read.
All events are counted, in every stream; those of 1 % are compared whole, text, token ids, usage and end. Everything
shares this machine's cores. Writes docs/results/capacity.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))
from demo_model import ensure_demo_model

from bench.capacity_client import Calls, Reading, Received
from bench.capacity_worker import PLAN, Plan, StepLog
from bench.report import write_result

MODEL = "fake"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# One in a hundred is compared whole.
KEPT_SHARE = 0.01
# Characters of several tokens among the plain ones: their text comes with the last of them.
_MIXED = 'naïve cafés in 東京, Οδυσσέας, здравствуй, 😀 and 👩‍🚀: `x = {"a": "b\\n"}` <b>&</b>\t\n'


@dataclass(frozen=True)
class Expected:
    """What one stream must be. ``tokens[j]`` is the number of the token that event ``opening + j`` tells of."""

    path: str
    token_ids: list[int]
    tokens: list[int]
    opening: int
    num_events: int


def plan_for(folder: Path, tokenizer: Tokenizer, num_streams: int, rate: float, log: Path) -> Plan:
    """Tokens of this project's pages, mixed with characters beyond ASCII; streams begin at different places."""
    pages = [(ROOT / "docs" / name).read_text() for name in ("architecture.md", "orchestrator.md", "policies.md")]
    lines = "\n".join(pages).splitlines()
    text = "\n".join(line + (_MIXED if i % 20 == 0 else "") for i, line in enumerate(lines))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    # A stream that begins inside a character would begin with what is no text.
    clean = [i for i, token in enumerate(tokens) if "\ufffd" not in tokenizer.decode([token])]
    starts = [clean[(i * 197) % len(clean)] for i in range(num_streams)]
    return Plan(str(folder), tokenizer.get_vocab_size(), tokens, starts, num_streams, rate, str(log))


def call(i: int, num_tokens: int, keeps: bool) -> tuple[str, dict[str, Any]]:
    """Path and body of stream ``i``, whose seed tells the engine which one it is."""
    body = {"model": MODEL, "stream": True, "max_tokens": num_tokens, "seed": i, "ignore_eos": True}
    body |= {"stream_options": {"include_usage": True}} | ({"return_token_ids": True} if keeps else {})
    if i % 2:
        return COMPLETIONS, body | {"prompt": "Hello, world."}
    return CHAT, body | {"messages": [{"role": "user", "content": "Hello, world."}]}


def expected(tokenizer: Tokenizer, path: str, token_ids: list[int], keeps: bool) -> Expected:
    """By the tokenizers library's own stream of text: a token without text has no event unless ids are asked for."""
    stream, texts = DecodeStream(skip_special_tokens=True), []
    for token in token_ids:
        texts.append(stream.step(tokenizer, token) or "")
    is_cut = len("".join(texts)) < len(tokenizer.decode(token_ids))
    last = len(token_ids) - 1
    told = [k for k, text in enumerate(texts) if text or keeps or (k == last and (is_cut or path == COMPLETIONS))]
    opening = int(path == CHAT)
    # Behind the tokens: a chat's end, the usage, and [DONE].
    return Expected(path, token_ids, told, opening, opening + len(told) + opening + 2)


def check(tokenizer: Tokenizer, wanted: Expected, reading: Reading) -> None:
    """Raises AssertionError where a stream is not what it must be."""
    assert not reading.data or reading.data.startswith(b"HTTP/1.1 200 "), reading.data
    found = reading.counts[-1] if reading.counts else 0
    assert found == wanted.num_events, f"{found} events of {wanted.num_events} in a stream of {wanted.path}"
    if not reading.data:
        return
    body = reading.data.partition(b"\r\n\r\n")[2]
    *chunks, usage, done = dechunked(body).decode().removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]", done
    told = json.loads(usage.removeprefix("data: "))
    assert told["choices"] == [] and told["usage"]["completion_tokens"] == len(wanted.token_ids), told
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    texts = [c["text"] if wanted.path == COMPLETIONS else c["delta"].get("content", "") for c in choices]
    assert "".join(texts) == tokenizer.decode(wanted.token_ids), "the text is another"
    assert [t for c in choices for t in c.get("token_ids", ())] == wanted.token_ids, "the token ids are others"
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"], "the end is another"


def dechunked(body: bytes) -> bytes:
    """The content of a chunked HTTP/1.1 body."""
    parts, place = [], 0
    while True:
        end = body.index(b"\r\n", place)
        size = int(body[place:end], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        assert body[end + 2 + size : end + 4 + size] == b"\r\n"
        place = end + 4 + size


def latencies(wanted: Expected, reading: Reading, sent: list[float]) -> list[float]:
    """Seconds from the worker's step to the client's read, for each token that has an event of its own."""
    times = reading.times
    reads = (bisect_left(reading.counts, wanted.opening + j + 1) for j in range(len(wanted.tokens)))
    return [times[read] - sent[k] for read, k in zip(reads, wanted.tokens, strict=True)]


def run(num_streams: int, rate: float, num_tokens: int, profile: Path | None = None) -> dict[str, Any]:
    """Figures of one server, from its start to its end. Raises AssertionError when a stream is wrong."""
    folder = ensure_demo_model()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    keeps = set(range(0, num_streams, max(num_streams // math.ceil(num_streams * KEPT_SHARE), 1)))
    calls = [call(i, num_tokens, i in keeps) for i in range(num_streams)]
    with tempfile.TemporaryDirectory(prefix="capacity-") as name:
        log = Path(name) / "steps.json"
        plan = plan_for(folder, tokenizer, num_streams, rate, log)
        received = _serve(Path(name), plan, calls, sorted(keeps), profile)
        wanted = [expected(tokenizer, path, plan.drawn(i, num_tokens), i in keeps) for i, (path, _) in enumerate(calls)]
        for one, reading in zip(wanted, received.streams, strict=True):
            check(tokenizer, one, reading)
        steps = msgspec.json.decode(log.read_bytes(), type=StepLog)
    return _figures(plan, num_tokens, len(keeps), wanted, received, steps)


def _serve(folder: Path, plan: Plan, calls: list[Any], keeps: list[int], profile: Path | None) -> Received:
    """Start the server, have the client process read all streams, and stop it."""
    (folder / "plan.json").write_bytes(msgspec.json.encode(plan))
    port_file = folder / "port"
    tool = [] if profile is None else ["-m", "cProfile", "-o", str(profile)]
    command = [sys.executable, *tool, "-m", "peft_dist.cli", "serve", plan.tokenizer, "--launcher", "plain"]
    options = {
        "replica-factory": "scripts.bench.capacity_worker:build",
        "served-model-name": MODEL,
        "device": "cpu",
        "port": 0,
        "port-file": port_file,
        "max-num-seqs": plan.num_streams,
        "log-level": "warning",
    }
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, PLAN: str(folder / "plan.json"), "PYTHONPATH": _python_path()}
    server = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        # What another process tells by a file is no event that can be waited for.
        while not port_file.exists():
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with status {server.returncode}: its last words are above")
            time.sleep(0.05)
        asked = Calls(int(port_file.read_text()), server.pid, calls, keeps)
        (folder / "calls.json").write_bytes(msgspec.json.encode(asked))
        client = [sys.executable, str(ROOT / "scripts" / "bench" / "capacity_client.py")]
        subprocess.run([*client, str(folder / "calls.json"), str(folder / "received")], check=True)
    finally:
        server.terminate()
        server.wait()
    return msgspec.msgpack.decode((folder / "received").read_bytes(), type=Received)


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _figures(
    plan: Plan, num_tokens: int, num_kept: int, wanted: list[Expected], received: Received, steps: StepLog
) -> dict[str, Any]:
    seconds = np.concatenate(
        [latencies(one, reading, steps.sent) for one, reading in zip(wanted, received.streams, strict=True)]
    )
    total = plan.num_streams * num_tokens
    last = max(reading.times[-1] for reading in received.streams)
    num_reads = sum(len(reading.times) for reading in received.streams)
    return {
        "streams": plan.num_streams,
        "tokens_of_each": num_tokens,
        "offered_tokens_per_second": round(plan.rate),
        "sent_tokens_per_second": round((total - plan.num_streams) / (steps.sent[-1] - steps.sent[0])),
        "received_tokens_per_second": round(total / (last - steps.sent[0])),
        "added_latency_ms": {
            name: round(1e3 * float(np.quantile(seconds, q)), 2)
            for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        },
        "cpu_microseconds_per_token": {
            "server": round(1e6 * received.server_cpu_seconds / total, 1),
            "worker": round(1e6 * steps.cpu_seconds / total, 1),
            "client": round(1e6 * received.client_cpu_seconds / total, 1),
        },
        "events": sum(one.num_events for one in wanted),
        "events_per_read": round(sum(one.num_events for one in wanted) / num_reads, 2),
        "bytes": sum(reading.num_bytes for reading in received.streams),
        "streams_compared_whole": num_kept,
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[10_000, 25_000, 40_000, 80_000])
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each rate")
    parser.add_argument("--repeats", type=int, default=1, help="of all rates in turn; medians are told too")
    parser.add_argument("--profile", type=Path, help="write what cProfile saw of the last server")
    parser.add_argument("--no-result", action="store_true", help="print only")
    args = parser.parse_args()
    figures = []
    for rate in args.rates * args.repeats:
        num_tokens = max(int(rate * args.seconds / args.streams), 2)
        figures.append(run(args.streams, rate, num_tokens, args.profile))
        print(json.dumps(figures[-1]), flush=True)
    medians = {f"{rate:g}": middle(figures, rate) for rate in args.rates}
    print(json.dumps(medians))
    if not args.no_result:
        print(write_result("capacity", {"runs": figures, "medians": medians}))


def middle(figures: Sequence[dict[str, Any]], rate: float) -> dict[str, float]:
    """Medians over the runs at a rate: of what was passed on, and of the added latency's P50 and P99 (ms)."""
    own = [figure for figure in figures if figure["offered_tokens_per_second"] == rate]
    passed = statistics.median(figure["received_tokens_per_second"] for figure in own)
    late = {name: statistics.median(figure["added_latency_ms"][name] for figure in own) for name in ("p50", "p99")}
    return {"received_tokens_per_second": passed, **late}


if __name__ == "__main__":
    main()
