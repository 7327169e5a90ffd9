"""Several replicas under a skewed load: `dlora` against `proactive` and `rr`, the same arrivals for each.

    python scripts/bench/bench_balance.py [--shape 8b] [--loads 0.6 0.8 1.0] [--seconds 20] [--seeds 1]
                                           [--replicas 4 --adapters 128 --kill]
    python scripts/bench/bench_balance.py --join balance_a.json more.jsonl  # one result of runs on one machine
    python scripts/bench/bench_balance.py --plot balance.json               # draw the picture of a result again

A service for each kind of migration, one after another, in real processes. The n-th adapter is asked for in proportion
to n^-skew, by arrivals of its own with Gamma gaps (bursts: `--cv`). `--loads` are shares of the requests per second
that the first service answers when as many are there at once, evenly over the adapters; that run also warms each
service up. The first `--warm` seconds of arrivals are served and not counted: placements are made from them. Queueing
is a request's time to its first token less that of a lone one. A run whose client fell behind its schedule is refused.
``--kill``: one more run of each kind, in the middle of which a replica is killed (kill -9); like all others it fails
when a request is lost, or a token is missing or comes twice.
Writes docs/results/balance[_NAME].json and .svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.balance_load import Load, Results, answer_all, arrivals, idle_first_token, serve
from bench.balance_report import plot, table
from bench.cluster_engine import add_engine_options, prepare
from bench.gpu_workload import read_lines
from bench.report import RESULTS, write_result
from peft_dist.core.config import EngineConfig
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.placement.placer import KINDS
from peft_dist.worker.launcher import PlainLauncher

# Seconds that the client may be late for its own schedule at the 99th percentile.
_MAX_LATE = 0.05


async def measure(
    options: argparse.Namespace, config: EngineConfig, adapters: dict[str, Path], write: Callable[[Any], Any]
) -> None:
    """Every kind, at every load and seed; what there is is written after each."""
    rate, runs = options.rate, []
    for kind in options.kinds:
        launcher = PlainLauncher(config, log_level="warning", num_replicas=options.replicas)
        asked = OrchestratorOptions(config.max_num_seqs, 1 << 16, 1, migration=kind)
        service = EngineService(launcher, asked, num_replicas=options.replicas)
        try:
            await service.start()
            for name, path in adapters.items():
                await service.load_adapter(name, str(path))
            burst = Load(list(adapters), options.skew, options.cv, options.longest)
            found = await answer_all(service, burst.even(options.burst, seed=0))
            rate = rate or found
            idle = await idle_first_token(service, burst)
            print(f"{kind}: {found:.2f} requests/s at once, first token of a lone one {1e3 * idle:.1f} ms", flush=True)
            for seed in range(options.seeds):
                for load in options.loads:
                    planned = arrivals(burst, load * rate, options.warm + options.seconds, seed)
                    got = await serve(service, planned, options.warm, f"{kind}.{seed}.{load}")
                    runs.append({"migration": kind, "load": load, "seed": seed, **summary(got, idle, service)})
                    print(json.dumps(runs[-1]), flush=True)
                    write({"requests_per_second_at_load_1": rate, "runs": runs})
            if options.kill:
                load = options.loads[-1]
                planned = arrivals(burst, load * rate, options.warm + options.seconds, options.seeds)
                dies = asyncio.create_task(kill_one(service, options.warm + options.seconds / 2))
                got = await serve(service, planned, options.warm, f"{kind}.killed")
                runs.append({
                    "migration": kind, "load": load, "seed": options.seeds, "killed": await dies,
                    **summary(got, idle, service),
                })  # fmt: skip
                print(json.dumps(runs[-1]), flush=True)
                write({"requests_per_second_at_load_1": rate, "runs": runs})
        finally:
            await service.stop()


async def kill_one(service: EngineService, after: float) -> int:
    """Kill the last replica, in so many seconds; which one it was."""
    await asyncio.sleep(after)
    replica, pid = max(service.replica_pids().items())
    os.kill(pid, signal.SIGKILL)
    return replica


def summary(found: Results, idle: float, service: EngineService) -> dict[str, Any]:
    """Raises RuntimeError where the client was late, and its figures say nothing."""
    late = found.late(0.99)
    if late > _MAX_LATE:
        raise RuntimeError(f"the client was {1e3 * late:.0f} ms behind its schedule (P99): give it a core of its own")
    handover, view = service._core.handover, service._core.migration.view()
    return {
        **found.summary(idle),
        "client_late_p99_ms": round(1e3 * late, 1),
        "moved_with_kv_so_far": handover.num_with_kv,
        "moves_failed_so_far": handover.num_failed,
        "planned_so_far": None if view is None else {"moves": view.moves, "placements": view.num_placements},
    }


def join(options: argparse.Namespace) -> Path:
    """The runs of a result, with those that were cut off before they wrote one; of two alike the first counts."""
    first, *others = options.join
    result = json.loads(first.read_text())
    runs = {_key(run): run for run in result["figures"]["runs"]}
    for path in others:
        for run in read_lines(path.read_text()):
            runs.setdefault(_key(run), run)
    figures = result["figures"] | {"runs": list(runs.values())}
    return write_result(_name(options), figures, options.output, result["environment"])


def _key(run: dict[str, Any]) -> tuple[str, float, int, bool]:
    return run["migration"], run["load"], run["seed"], "killed" in run


def _name(options: argparse.Namespace) -> str:
    return f"balance_{options.name}" if options.name else "balance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_options(parser)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.8, 1.0])
    parser.add_argument("--rate", type=float, help="requests per second at load 1, instead of measuring it")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm", type=float, default=5.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kill", action="store_true", help="one more run of each kind, in which a replica dies")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--max-loras", type=int, help="adapters on a device at once")
    parser.add_argument("--max-num-seqs", type=int, default=32, help="sequences that a replica runs at once")
    parser.add_argument("--skew", type=float, default=1.0)
    parser.add_argument("--cv", type=float, default=3.0, help="of the gaps between the arrivals of one adapter")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a prompt, and of an answer")
    parser.add_argument("--burst", type=int, default=256, help="requests of the run that finds the rate")
    parser.add_argument("--name", default="", help="of the result file: balance_NAME.json")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--folder", type=Path, help="where adapters are kept (default: removed again)")
    parser.add_argument("--join", type=Path, nargs="+", help="a result, and lines that other runs printed, instead")
    parser.add_argument("--plot", type=Path, help="draw this result again and measure nothing")
    options = parser.parse_args()
    if options.plot:
        figures = json.loads(options.plot.read_text())["figures"]
        print(table(figures["runs"]))
        plot(figures["runs"], options.plot.with_suffix(".svg"))
        return
    if options.join:
        print("written to", join(options))
        return
    settings = {
        key: str(value) for key, value in vars(options).items() if key not in ("output", "folder", "plot", "join")
    }
    with tempfile.TemporaryDirectory() as folder:
        config, adapters = prepare(
            options, options.folder or Path(folder), options.adapters, options.max_loras,
            max_num_seqs=options.max_num_seqs, max_model_len=2048, enable_prefix_caching=False,
        )  # fmt: skip
        path: Path | None = None

        def write(figures: dict[str, Any]) -> None:
            nonlocal path
            path = write_result(_name(options), {"settings": settings, **figures}, options.output)

        asyncio.run(measure(options, config, adapters, write))
    assert path is not None
    print(table(json.loads(path.read_text())["figures"]["runs"]))
    print("written to", path, "- draw it with --plot")


if __name__ == "__main__":
    main()
