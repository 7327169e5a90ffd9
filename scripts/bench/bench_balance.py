"""Several replicas under a skewed load: `dlora` against `proactive` and `rr`, the same arrivals for each.

    python scripts/bench/bench_balance.py [--shape 8b] [--loads 0.6 0.8 1.0] [--seconds 20] [--seeds 1]
                                           [--replicas 4 --adapters 128 --kill] [--trace [--data DIR]]
    python scripts/bench/bench_balance.py --simulate balance.json --profile FILE  # the same arrivals, simulated
    python scripts/bench/bench_balance.py --join balance_a.json balance_b.json printed.log  # of runs on one machine
    python scripts/bench/bench_balance.py --plot balance.json               # draw the picture of a result again

A service for each kind of migration, one after another, in real processes. The n-th adapter is asked for in proportion
to n^-skew, by arrivals of its own with Gamma gaps (bursts: `--cv`); with `--trace` as Figure 11a asks for them: MAF2's
functions, the most popular first, and ShareGPT's lengths up to `--max-total` (synthetic without `--data`). `--loads`
are shares of the requests per second that the first service answers when as many are there at once, evenly over the
adapters (with `--trace` between the end of the first and the third quarter, and the last one is aborted); such a run,
twice, also warms each service up. The first `--warm` seconds of arrivals are served and not counted: placements are
made from them. Queueing is a request's time to its first token less that of a lone one. A run whose client fell behind
its schedule is refused. ``--kill``: one more run of each kind, in the middle of which a replica is killed (kill -9);
like all others it fails when a request is lost, or a token is missing or comes twice.
``--simulate``: each run without a death again in the simulator, counted in the same way, from the arrivals that the
settings give; written into the result, with simulated over live.
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
from experiments.loads import Data

from bench.balance_load import Offered, Results, answer_all, answer_most, idle_first_token, serve, until_warm
from bench.balance_moves import Moves
from bench.balance_report import plot, table
from bench.balance_settings import of_result, to_keep
from bench.balance_simulated import as_table, simulated
from bench.balance_trace import offered
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
    options: argparse.Namespace,
    config: EngineConfig,
    adapters: dict[str, Path],
    asked: Offered,
    write: Callable[[Any], Any],
) -> None:
    """Every kind, at every load and seed; what there is is written after each."""
    rate, runs = options.rate, []
    for kind in options.kinds:
        launcher = PlainLauncher(config, log_level="warning", num_replicas=options.replicas)
        core = OrchestratorOptions(config.max_num_seqs, 1 << 16, 1, migration=kind)
        service = EngineService(launcher, core, num_replicas=options.replicas)
        try:
            await service.start()
            for name, path in adapters.items():
                await service.load_adapter(name, str(path))
            # A step that is captured while requests wait for it holds up all of its replica by a quarter of a second.
            await until_warm(service)
            found = await warm_up(options, service, asked)
            rate = found if rate is None else rate
            idle = await idle_first_token(service, asked)
            print(f"{kind}: {found:.2f} requests/s at once, first token of a lone one {1e3 * idle:.1f} ms", flush=True)
            plans = [(load, seed, False) for seed in range(options.seeds) for load in options.loads]
            if options.kill:
                plans.append((options.loads[-1], options.seeds, True))
            for load, seed, kills in plans:
                planned = asked.over_time(load * rate, options.warm + options.seconds, seed)
                moves = Moves(service)
                run: dict[str, Any] = {"migration": kind, "load": load, "seed": seed}
                dies = asyncio.create_task(kill_one(service, options.warm + options.seconds / 2)) if kills else None
                got = await serve(service, planned, options.warm, f"{kind}.{seed}.{load}")
                if dies is not None:
                    run |= await dies
                runs.append({**run, **summary(got, idle), **moves.since()})
                print(json.dumps(runs[-1]), flush=True)
                write({"requests_per_second_at_load_1": rate, "runs": runs})
        finally:
            await service.stop()


async def warm_up(options: argparse.Namespace, service: EngineService, asked: Offered) -> float:
    """Requests per second that are answered at once."""
    # Of a tail of long answers enough are asked for that no seat is empty before the third quarter has ended.
    count = options.burst or (4 * options.replicas * options.max_num_seqs if options.trace else 256)
    answer = answer_most if options.trace else answer_all
    return await answer(service, asked.even(count, seed=0))


async def kill_one(service: EngineService, after: float) -> dict[str, int]:
    """Kill the last replica, in so many seconds; which one it was, and how many requests it had."""
    await asyncio.sleep(after)
    replica, pid = max(service.replica_pids().items())
    os.kill(pid, signal.SIGKILL)
    return {"killed": replica, "requests_it_had": len(service._core._requests.on_replica(replica))}


def summary(found: Results, idle: float) -> dict[str, Any]:
    """Raises RuntimeError where the client was late, and its figures say nothing."""
    late = found.late(0.99)
    if late > _MAX_LATE:
        raise RuntimeError(f"the client was {1e3 * late:.0f} ms behind its schedule (P99): give it a core of its own")
    return {**found.summary(idle), "client_late_p99_ms": round(1e3 * late, 1)}


def join(options: argparse.Namespace) -> Path:
    """The runs of a result, with those that were cut off before they wrote one; of two alike the first counts."""
    first, *others = options.join
    result = json.loads(first.read_text())
    runs = {_key(run): run for run in result["figures"]["runs"]}
    for path in others:
        for run in _runs(path.read_text()):
            runs.setdefault(_key(run), run)
    kinds = list(dict.fromkeys(kind for kind, *_ in runs))
    settings = result["figures"]["settings"] | {"kinds": kinds, "name": options.name}
    figures = result["figures"] | {"settings": settings, "runs": list(runs.values())}
    return write_result(_name(options), figures, options.output, result["environment"])


def _runs(text: str) -> list[dict[str, Any]]:
    """Of a result, or of what a run printed."""
    try:
        found: list[dict[str, Any]] = json.loads(text)["figures"]["runs"]
    except json.JSONDecodeError:  # Several lines of JSON, and others between them.
        return list(read_lines(text))
    return found


def _key(run: dict[str, Any]) -> tuple[str, float, int, bool]:
    return run["migration"], run["load"], run["seed"], "killed" in run


def _name(options: argparse.Namespace) -> str:
    return f"balance_{options.name}" if options.name else "balance"


def simulate(options: argparse.Namespace, data: Data) -> None:
    """Write what the simulator says of a result's runs into it, and print both."""
    if options.profile is None:
        raise SystemExit("--simulate needs --profile: a file of scripts/profile_costs.py, or a name of the package's")
    path = options.simulate
    result = json.loads(path.read_text())
    figures = result["figures"]
    live = of_result(figures["settings"], parser(), data)
    found = simulated(figures, live, options.profile, data)
    write_result(path.stem, figures | {"simulated": found}, path.parent, result["environment"])
    print(as_table(found["runs"]))
    print("written to", path)


def parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--end-id", type=int, default=30_000, help="prompts are ids below it, for small vocabularies")
    parser.add_argument("--trace", action="store_true", help="the load of Figure 11a, without --skew, --cv, --longest")
    parser.add_argument("--max-total", type=int, default=2048, help="tokens of a prompt and its answer, of a trace")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with maf2/, ShareGPT's JSON or lengths.csv")
    parser.add_argument("--tokenizer", help="folder or hub id, to count ShareGPT's tokens")
    parser.add_argument(
        "--burst", type=int, help="requests of the run that finds the rate (256; of a trace 4 for each seat)"
    )
    parser.add_argument("--name", default="", help="of the result file: balance_NAME.json")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--folder", type=Path, help="where adapters are kept (default: removed again)")
    parser.add_argument("--join", type=Path, nargs="+", help="a result, and others or lines that runs printed, instead")
    parser.add_argument("--plot", type=Path, help="draw this result again and measure nothing")
    parser.add_argument("--simulate", type=Path, metavar="RESULT", help="simulate this result's runs instead")
    parser.add_argument("--profile", help="of a replica, for --simulate: a file, or one of the package's by name")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.plot:
        figures = json.loads(options.plot.read_text())["figures"]
        print(table(figures["runs"]))
        plot(figures["runs"], options.plot.with_suffix(".svg"))
        return
    if options.join:
        print("written to", join(options))
        return
    data = Data.found(options.data, options.tokenizer)
    if options.simulate:
        simulate(options, data)
        return
    settings = to_keep(options, data)
    with tempfile.TemporaryDirectory() as folder:
        config, adapters = prepare(
            options, options.folder or Path(folder), options.adapters, options.max_loras,
            max_num_seqs=options.max_num_seqs, max_model_len=2048, enable_prefix_caching=False,
        )  # fmt: skip
        path: Path | None = None

        def write(figures: dict[str, Any]) -> None:
            nonlocal path
            path = write_result(_name(options), {"settings": settings, **figures}, options.output)

        asked = offered(options, list(adapters), data)
        asyncio.run(measure(options, config, adapters, asked, write))
    assert path is not None
    print(table(json.loads(path.read_text())["figures"]["runs"]))
    print("written to", path, "- draw it with --plot")


if __name__ == "__main__":
    main()
