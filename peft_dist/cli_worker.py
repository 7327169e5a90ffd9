"""``peft-dist worker``: a replica that joins a server which runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_dist.cli_options import LOG_LEVELS, one_of, run
from peft_dist.core.config import parse_bytes

if TYPE_CHECKING:
    from peft_dist.worker.joining import JoinSettings


def worker(
    join: Annotated[str, typer.Option(help="tcp://host:port that a server listens on (peft-dist serve --listen).")],
    cluster_key: Annotated[Path | None, typer.Option(help="The server's keys.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the base model lies here, if elsewhere.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N, if another than the server's.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the model; no more than cores are free.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of the device's memory, if another.")
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks on the device, if another number.")] = None,
    adapter_device_memory: Annotated[str | None, typer.Option(help="Room for adapters, if other: 512MiB...")] = None,
    adapter_host_memory: Annotated[str | None, typer.Option(help="Host copies of adapters, if other: 2GiB...")] = None,
    silence: Annotated[float, typer.Option(help="Seconds without a word of the server until it is given up.")] = 10.0,
    orphan_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that the model is kept for another server then.")
    ] = 60.0,
    kv_endpoint: Annotated[str | None, typer.Option(help="tcp://HOST:* where others read KV, or none.")] = None,
    leave_timeout: Annotated[float, typer.Option(min=0, help="Seconds for requests to move when it leaves.")] = 60.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    launcher: Annotated[str, typer.Option(help="accelerate or plain.", hidden=True)] = "accelerate",
) -> None:
    """Be a replica of a running server until SIGTERM or Ctrl-C, which moves its requests away first."""
    from peft_dist.cli_serve import configure_logging
    from peft_dist.worker.joining import JoinSettings
    from peft_dist.worker.launcher import LAUNCHERS

    own: dict[str, object] = {"model": model, "device": device, "num_threads": threads, "num_blocks": num_blocks}
    own["gpu_memory_utilization"] = gpu_memory_utilization
    for name, text in (("device", adapter_device_memory), ("host", adapter_host_memory)):
        own[f"adapter_{name}_memory"] = None if text is None else parse_bytes(f"--adapter-{name}-memory", text)
    engine = {name: value for name, value in own.items() if value is not None}
    if gpu_memory_utilization is not None and num_blocks is None:
        engine["num_blocks"] = None  # The server's number would go before the share.
    settings = JoinSettings(
        address=join,
        key_file=cluster_key,
        engine=engine,
        launcher=one_of("launcher", launcher, tuple(LAUNCHERS)),
        silence=silence,
        orphan_timeout=orphan_timeout,
        kv_endpoint=kv_endpoint,
        leave_timeout=leave_timeout,
        log_level=one_of("log-level", log_level.lower(), LOG_LEVELS),
    )
    configure_logging(settings.log_level)
    run(run_worker(settings))


async def run_worker(settings: JoinSettings) -> None:
    """Raises SystemExit with the status of the replica when that is not 0."""
    from peft_dist.core.waiting import StopSignals
    from peft_dist.worker.joining import join

    if code := await join(settings, StopSignals().stop):
        sys.exit(code)
