"""How long a killed server is away: kill -9 during streams, then the same command again.

    python scripts/bench/bench_restart.py [--rounds 5] [--replicas 2] [--launcher accelerate]

A server of SmolLM2-135M-Instruct (or `--model`) on the CPU with two adapters, one of them loaded over HTTP. In each
round streams run on both, the server is killed, and started again with the same options. Told are the seconds from that
start until `/ready` answers 200 for all replicas, and until a request with an adapter has its answer, which must be the
one before. The workers must be the same processes, and bring no adapter to the device again. The first start, which
loads everything, is told for comparison. Writes docs/results/restart.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from bench.workload import write_adapters

ROOT = Path(__file__).parents[2]
PROMPT = [504, 2, 30, 11, 8]
NUM_STREAMS = 8
PATIENCE = 300.0


@dataclass
class Server:
    """One life of a server, on a state folder and a port file that all share."""

    command: list[str]
    folder: Path
    port_file: Path
    replicas: int
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.port_file.unlink(missing_ok=True)
        self.log = self.folder / f"log{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port_file.read_text().strip()}"

    def wait(self, condition: Callable[[], bool]) -> float:
        """Seconds since this life began until something is so."""
        while not condition():
            if self.process.poll() is not None or time.perf_counter() > self.began + PATIENCE:
                raise SystemExit(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.005)
        return time.perf_counter() - self.began

    def is_ready(self) -> bool:
        return self.port_file.exists() and httpx.get(f"{self.url}/ready?replicas={self.replicas}").status_code == 200

    def ask(self, model: str) -> list[int]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE)
        answer.raise_for_status()
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens

    def loads(self) -> int:
        """Adapters that were brought to devices, over all replicas, as they count it themselves."""
        metrics = httpx.get(f"{self.url}/metrics").text
        return round(sum(map(float, re.findall(r"peft_dist:adapter_loads_total\{[^}]*\} (\S+)", metrics))))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def stream(url: str, model: str, begun: threading.Semaphore) -> None:
    """Read until the server is gone."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 2000, "stream": True, "ignore_eos": True}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number == 4:
                    begun.release()
    except httpx.HTTPError:
        return


def workers(state: Path) -> dict[str, int]:
    return {path.parent.name: json.loads(path.read_text())["pid"] for path in sorted(state.glob("*/process.json"))}


def kill_during_streams(server: Server) -> None:
    begun = threading.Semaphore(0)
    for number in range(NUM_STREAMS):
        model = ("adapter0", "adapter1")[number % 2]
        threading.Thread(target=stream, args=(server.url, model, begun), daemon=True).start()
    for _ in range(NUM_STREAMS):
        begun.acquire(timeout=PATIENCE)
    server.kill()


def measure(options: argparse.Namespace, command: list[str], adapters: dict[str, Path], folder: Path) -> dict[str, Any]:
    state, port_file = folder / "state", folder / "port"
    command = [*command, "--state-dir", str(state), "--port", "0", "--port-file", str(port_file)]
    command += ["--adapter", f"adapter0={adapters['adapter0']}"]
    server = Server(command, folder, port_file, options.replicas)
    try:
        first = server.wait(server.is_ready)
        load = {"lora_name": "adapter1", "lora_path": str(adapters["adapter1"])}
        httpx.post(f"{server.url}/v1/load_lora_adapter", json=load, timeout=PATIENCE).raise_for_status()
        expected = {name: server.ask(name) for name in ("adapter0", "adapter1")}
        known, ready, answered, wrong, reloads = workers(state), [], [], 0, 0
        for _ in range(options.rounds):
            kill_during_streams(server)
            loads = None
            server = Server(command, folder, port_file, options.replicas)
            ready.append(server.wait(server.is_ready))
            found = server.ask("adapter1")
            answered.append(time.perf_counter() - server.began)
            wrong += found != expected["adapter1"] or server.ask("adapter0") != expected["adapter0"]
            loads = server.loads()
            reloads = max(reloads, loads)
            if workers(state) != known:
                raise SystemExit("a worker was started anew")
            print(f"  ready after {ready[-1]:.2f} s, answered after {answered[-1]:.2f} s, {loads} loads", flush=True)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait()
    finally:
        server.kill()
        for pid in workers(state).values():
            os.killpg(pid, signal.SIGKILL)
    return {
        "first_start_s": round(first, 2),
        "ready_s": summary(ready),
        "answer_with_adapter_s": summary(answered),
        "answers_that_differ": wrong,
        "workers_started_anew": 0,
        "adapter_loads_of_all_lives": reloads,
    }


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(seconds), 2),
        "most": round(max(seconds), 2),
        "all": [round(one, 2) for one in seconds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another Llama-like model folder (default: the demo's SmolLM2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--launcher", default="accelerate")
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--output", type=Path, help="folder for restart.json (default: docs/results)")
    options = parser.parse_args()
    from demo_model import ensure_demo_model

    model = options.model or ensure_demo_model()
    command = [sys.executable, "-m", "peft_dist.cli", "serve", str(model), "--device", "cpu"]
    command += ["--replicas", str(options.replicas), "--launcher", options.launcher, "--threads", str(options.threads)]
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("output", "model")}
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(model, Path(folder), num_adapters=2)
        figures = measure(options, command, adapters, Path(folder))
    print("written to", write_result("restart", {"settings": settings, **figures}, options.output))


if __name__ == "__main__":
    main()
