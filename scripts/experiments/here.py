"""An experiment for real on this machine: a server for each system, one after another.

    python scripts/experiments/here.py fig10_policies --model FOLDER --replicas 1 --systems fcfs,merge,dlora \\
        --serve "--device cpu --max-num-seqs 16" --options "--scale tiny --rate-factor 0.5 --output figures"

Starts ``peft-dist serve`` for each of the systems, with adapters drawn at random (or those of ``--adapters``), has the
experiment put its load to it, and stops it. ``--serve`` are further options of the server, ``--options`` those of the
experiment.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import environment_apart
from make_random import write_adapters

from experiments.systems import SYSTEMS, System

ROOT = Path(__file__).parents[2]
# Seconds for loading the model and the adapters, and for ending.
START, END = 600, 60


def options_of(system: System) -> list[str]:
    """What tells a system's server from others'. Raises SystemExit for one that no live server is."""
    if not system.is_live:
        raise SystemExit(f"a live server is no {system.name!r}: {system.live}")
    exec_type = system.exec_type.removesuffix("-artifact")
    found = ["--migration", system.migration, "--exec-type", exec_type if exec_type != "grouped" else "dlora"]
    if system.policy is not None:
        found += ["--policy", system.policy]
    if system.form == "artifact":
        found += ["--policy-profile", "artifact"]
    if system.name == "corrected":
        found.append("--merged-minority")
    return found


@contextmanager
def serving(model: str, adapters: Sequence[Path], options: Sequence[str]) -> Iterator[str]:
    """A server's URL, once it is ready. Raises SystemExit with the end of its log where it does not become so."""
    with tempfile.TemporaryDirectory() as folder:
        port, log = Path(folder, "port"), Path(folder, "log")
        command = [sys.executable, "-m", "peft_dist.cli", "serve", model, "--port", "0", "--port-file", str(port)]
        for path in adapters:
            command += ["--adapter", f"{path.name}={path}"]
        with log.open("w") as file:
            process = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            deadline = time.monotonic() + START
            while not port.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server is not ready: {log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{int(port.read_text())}"
        finally:
            process.terminate()
            process.wait(END)


def told(serve: str) -> str:
    """What a server of this machine cannot be asked for, as ``--server-told`` takes it."""
    found = environment_apart()
    wanted = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    wanted.add_argument("--device", default="auto")
    on_cpu = wanted.parse_known_args(shlex.split(serve))[0].device == "cpu" or "gpu" not in found
    device = found["cpu" if on_cpu else "gpu"]
    versions = {name: value for name, value in found.items() if name not in ("date", "cpu", "cores", "gpu", "gpus")}
    return json.dumps({"device": device, "versions": versions, "options": serve})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a script of this folder, without .py")
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--systems", required=True, help="names as in the CSV, with commas between")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--adapters", type=Path, metavar="DIR", help="a subfolder each; drawn at random if not given")
    parser.add_argument("--count", type=int, default=8, help="of random adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--serve", default="", help="options of peft-dist serve")
    parser.add_argument("--options", default="", help="options of the experiment")
    options = parser.parse_args()
    script = Path(__file__).with_name(f"{options.experiment}.py")
    if not script.exists():
        raise SystemExit(f"there is no experiment {options.experiment!r} in {script.parent}")
    with tempfile.TemporaryDirectory() as folder:
        home = options.adapters or Path(folder)
        if options.adapters is None:
            write_adapters(options.model, home, options.count, options.rank)
        adapters = sorted(path.parent for path in home.glob("*/adapter_config.json"))
        about = told(options.serve)
        for name in options.systems.split(","):
            if name not in SYSTEMS:
                raise SystemExit(f"the system {name!r} is unknown: use {', '.join(SYSTEMS)}")
            more = ["--replicas", str(options.replicas), *options_of(SYSTEMS[name]), *shlex.split(options.serve)]
            with serving(options.model, adapters, more) as url:
                command = [sys.executable, str(script), "--server", url, "--systems", name, "--server-told", about]
                if status := subprocess.run([*command, *shlex.split(options.options)], check=False).returncode:
                    raise SystemExit(status)


if __name__ == "__main__":
    main()
