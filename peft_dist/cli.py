"""The ``peft-dist`` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit("peft-dist needs the server's packages: pip install 'peft-dist[server]'") from missing

from peft_dist import cli_help, cli_options
from peft_dist.api.tool_readers import READERS
from peft_dist.cli_admin import rolling_restart
from peft_dist.cli_bench import bench
from peft_dist.cli_options import LOG_LEVELS, one_of, run
from peft_dist.cli_simulate import simulate
from peft_dist.cli_worker import worker
from peft_dist.cli_workload import app as workload
from peft_dist.core.config import (
    EngineConfig,
    parse_bytes,
)
from peft_dist.core.errors import ConfigError, PeftDistError

API_KEYS_VARIABLE = "PEFT_DIST_API_KEY"
ADMIN_KEY_VARIABLE = "PEFT_DIST_ADMIN_KEY"
TOOL_CALL_PARSERS = ("auto", *READERS)

# A traceback with the values of local variables could show a key.
app = typer.Typer(cls=cli_help.InOrder, no_args_is_help=True, pretty_exceptions_enable=False)
for _command in (bench, rolling_restart, simulate, worker):
    app.command()(_command)
app.add_typer(workload, name="workload")


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=cli_help.show_version)
    ] = False,
) -> None:
    """Serve many LoRA adapters on one base model, and measure and simulate such servers."""


@app.command()
def version() -> None:
    """Print the version."""
    from peft_dist import __version__

    typer.echo(__version__)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the base model whose layers are measured.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters that are measured.")] = 16,
    max_loras: Annotated[int, typer.Option(min=1, help="Adapters on the device at once.")] = 64,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences in one step.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in one step.")] = 2048,
    tile_rows: Annotated[list[int] | None, typer.Option(help="16 (decode), 32, 64, 128; all if not given.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the table, if not the user's cache.")] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds; the plans of frequent steps come first.")] = 270.0,
) -> None:
    """Measure how to launch the LoRA kernels on this GPU, and keep the answers for every later start."""
    from peft_dist.runner import tune as tuning

    path = tuning.tune(
        tuning.model_sizes(model),
        rank=rank,
        max_loras=max_loras,
        max_num_seqs=max_num_seqs,
        max_tokens=max_num_batched_tokens,
        tile_rows=tuple(tile_rows or (16, 32, 64, 128)),
        folder=output,
        seconds=time_limit,
    )
    typer.echo(path)


@app.command(cls=cli_help.InPanels)
def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the base model.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Folder or hub id; repeatable.")
    ] = None,
    adapter_dir: Annotated[Path | None, typer.Option(help="Load every adapter in it; HTTP loads stay inside.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8000,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once the server answers.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name of the base; more are aliases.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights, for benchmarks.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and output together, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences in one step.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens in one step.")] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens in one KV block.")] = 16,
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks on the device; from memory if not given.")] = None,
    attention_backend: Annotated[
        str, typer.Option(help="auto, vllm-flash-attn, flashinfer, triton, c or torch.")
    ] = "auto",
    kv_transfer: Annotated[str, typer.Option(help="auto, host or nixl: how KV gets to other replicas.")] = "auto",
    num_host_blocks: Annotated[int, typer.Option(help="KV blocks in host memory, for preemption by swap.")] = 0,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the device's memory to use.")] = 0.9,
    max_loras: Annotated[int, typer.Option(help="Adapters on the device at once.")] = 64,
    adapter_device_memory: Annotated[str | None, typer.Option(help="Room for adapters: 512MiB, 2GiB...")] = None,
    adapter_host_memory: Annotated[str | None, typer.Option(help="Host copies of adapters: 0, 512MiB, 2GiB...")] = None,
    adapter_load_timeout: Annotated[float, typer.Option(help="Seconds for one load of an adapter.")] = 120.0,
    pin_adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Stays on the device; repeatable.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="credit (default), merge or fcfs.")] = None,
    exec_type: Annotated[str, typer.Option(help="dlora, or the paper's baselines peft and vllm.")] = "dlora",
    resident_models: Annotated[int, typer.Option(help="Merged models on the device with --exec-type vllm.")] = 2,
    policy_profile: Annotated[str, typer.Option(help="default, or artifact: the paper's constants.")] = "default",
    max_adapter_wait: Annotated[float, typer.Option(help="Seconds that a request may be overtaken.")] = 5.0,
    merge: Annotated[str, typer.Option(help="auto, shadow, host or off: where merged weights live.")] = "auto",
    merged_minority: Annotated[bool, typer.Option("--merged-minority", help="Others may join merged batches.")] = False,
    decision_log: Annotated[Path | None, typer.Option(help="Write every step's decision here, a JSON a line.")] = None,
    cost_profile: Annotated[Path | None, typer.Option(help="Measured seconds, kept here between two starts.")] = None,
    metrics_max_adapters: Annotated[int, typer.Option(min=0, help="Adapters with metrics of their own.")] = 100,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; more are refused.")] = 1024,
    tensor_parallel_size: Annotated[int, typer.Option(help="Processes that one copy of the model is split over.")] = 1,
    replicas: Annotated[int, typer.Option(min=0, help="Copies of the model, each in processes of its own.")] = 1,
    listen: Annotated[str | None, typer.Option(help="Where replicas can join (tcp://host:port; port 0: any).")] = None,
    cluster_key: Annotated[Path | None, typer.Option(help="Keys (peft-dist keys) of those who may join.")] = None,
    migration: Annotated[
        str, typer.Option(help="Where adapters go and whether requests move: rr, proactive or dlora; with several.")
    ] = "dlora",
    migration_triggers: Annotated[
        str,
        typer.Option(help="When to plan: period=10,pause=1,kv_share=0.9,imbalance=1,imbalance_share=0.25,starving=5."),
    ] = "",
    handover_memory: Annotated[
        str, typer.Option(help="KV of a replica's requests on their way to others at once: 4GiB.")
    ] = "4GiB",
    planner_limit: Annotated[float, typer.Option(min=1, help="Milliseconds to plan which requests move.")] = 200.0,
    restart: Annotated[bool, typer.Option("--restart/--no-restart", help="Start dead replicas again.")] = True,
    heartbeat_timeout: Annotated[float, typer.Option(help="Seconds of silence until a replica is given up.")] = 10.0,
    step_timeout: Annotated[float, typer.Option(help="Seconds that one step of a replica may take.")] = 300.0,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="What finds the workers again after a crash; by port, in the user's runtime folder."),
    ] = None,
    orphan_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that workers wait for a server after a crash; 0: none.")
    ] = 60.0,
    api_key: Annotated[list[str] | None, typer.Option(help=f"Guards /v1; repeatable. And {API_KEYS_VARIABLE}.")] = None,
    admin_key: Annotated[str | None, typer.Option(help=f"Guards adapter loads. Or {ADMIN_KEY_VARIABLE}.")] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate (PEM): serve HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key, if that is not in the same file.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Whose pages may ask from a browser; repeatable, * for any.")
    ] = None,
    allow_hub_load: Annotated[bool, typer.Option("--allow-hub-load", help="HTTP loads may name hub ids.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin adapters, which run code.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the base model's code.")] = False,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file in place of the model's template.")] = None,
    generation_config: Annotated[
        str, typer.Option(help="Sampling where requests say nothing: auto (as the model recommends) or openai.")
    ] = "openai",
    tool_call_parser: Annotated[
        str, typer.Option(help=f"How the model writes calls of tools: {', '.join(TOOL_CALL_PARSERS)}.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the model; no more than cores are free.")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Steps in flight: 0 on CPU and 1 on a GPU if not given.")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Capture no CUDA graphs.")] = False,
    no_fuse: Annotated[bool, typer.Option("--no-fuse", help="Run the model's own code between its layers.")] = False,
    preemption: Annotated[str, typer.Option(help="auto, recompute or swap.")] = "auto",
    no_prefix_caching: Annotated[bool, typer.Option("--no-prefix-caching", help="Never reuse a prefix's KV.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seeds the requests that bring no seed.")] = None,
    start_timeout: Annotated[float | None, typer.Option(help="Seconds for loading the model; no limit.")] = None,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds that streams get to finish.")] = 30.0,
    unread_timeout: Annotated[float, typer.Option(help="Seconds for which a client may read or send nothing.")] = 60.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line for each request (info).")] = False,
    cluster: Annotated[str, typer.Option(help="What runs the replicas: local (this host) or ray.")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="HOST:PORT of the Ray head; found if not given.")] = None,
    ray_cpus: Annotated[float | None, typer.Option(min=0, help="CPUs a rank takes in Ray; --threads or 1.")] = None,
    ray_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs a rank takes in Ray; 1 if it uses one.")] = None,
    ray_placement_timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for room in Ray.")] = 300.0,
    launcher: Annotated[str, typer.Option(help="accelerate or plain.", hidden=True)] = "accelerate",
    replica_factory: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve MODEL and its adapters through an OpenAI-compatible API until SIGTERM or Ctrl-C."""
    given = locals()
    from peft_dist.api.listener import Tls
    from peft_dist.api.options import ServerOptions
    from peft_dist.cli_serve import ServeSettings, configure_logging, run_server
    from peft_dist.placement.triggers import TriggerSettings
    from peft_dist.worker.launcher import LAUNCHERS
    from peft_dist.worker.ray_cluster import RaySettings

    ray: RaySettings | None = RaySettings(ray_address, ray_cpus, ray_gpus, ray_placement_timeout)
    if one_of("cluster", cluster, ("local", "ray")) == "local":
        if ray != RaySettings():
            raise ConfigError("--ray-address, --ray-cpus, --ray-gpus and --ray-placement-timeout need --cluster ray")
        ray = None
    if not replicas and listen is None:
        raise ConfigError("--replicas 0 serves nobody unless others join: add --listen tcp://host:port")
    if ssl_keyfile is not None and ssl_certfile is None:
        raise ConfigError("--ssl-keyfile is of no use alone: add --ssl-certfile, the certificate that belongs to it")
    more_keys, other_admin = _take_variable(API_KEYS_VARIABLE).split(), _take_variable(ADMIN_KEY_VARIABLE)
    names = served_model_name or []
    settings = cli_options.of(
        ServeSettings,
        given,
        engine=cli_options.of(
            EngineConfig,
            given,
            served_model_name=names[0] if names else None,
            enable_prefix_caching=not no_prefix_caching,
            adapter_device_memory=None
            if adapter_device_memory is None
            else parse_bytes("--adapter-device-memory", adapter_device_memory),
            adapter_host_memory=None
            if adapter_host_memory is None
            else parse_bytes("--adapter-host-memory", adapter_host_memory),
            pinned_adapters=tuple(pin_adapter or ()),
            num_threads=threads,
            fuse=not no_fuse,
            decision_log=None if decision_log is None else str(decision_log),
            cost_profile=None if cost_profile is None else str(cost_profile),
        ),
        http=cli_options.of(
            ServerOptions,
            given,
            api_keys=(*(api_key or ()), *more_keys),
            admin_key=admin_key if admin_key is not None else other_admin or None,
            served_names=tuple(names[1:]),
            cors_origins=tuple(cors_origin or ()),
            chat_template=None if chat_template is None else _read(chat_template),
            tool_call_parser=one_of("tool-call-parser", tool_call_parser, TOOL_CALL_PARSERS),
        ),
        tls=None if ssl_certfile is None else Tls(ssl_certfile, ssl_keyfile),
        generation_config=one_of("generation-config", generation_config, ("auto", "openai")),
        adapters=[_name_and_path(text) for text in adapter or []],
        num_replicas=replicas,
        migration=one_of("migration", migration, ("rr", "proactive", "dlora")),
        triggers=cli_options.of_text(TriggerSettings, "--migration-triggers", migration_triggers),
        handover_memory=parse_bytes("--handover-memory", handover_memory),
        planner_limit=planner_limit / 1e3,
        launcher=one_of("launcher", launcher, tuple(LAUNCHERS)),
        ray=ray,
        log_level=one_of("log-level", log_level.lower(), LOG_LEVELS),
    )
    configure_logging(settings.log_level)
    run(run_server(settings))


@app.command()
def keys(file: Annotated[Path, typer.Argument(help="Is made; only this user can read it.")]) -> None:
    """Make the keys by which replicas of other machines join a server (--cluster-key at both)."""
    from peft_dist.core.cluster_keys import ClusterKeys

    ClusterKeys.make().write(file)
    typer.echo(f"{file}: bring it to every machine, and keep it secret")


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--adapter {text!r} is not NAME=PATH: write for example --adapter sql=adapters/sql")
    return name, path


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}") from error


def _take_variable(name: str) -> str:
    """An environment variable, removed so that child processes do not inherit it."""
    return os.environ.pop(name, "")


def main() -> None:
    """Entry point: errors of our own become one line and exit status 1."""
    try:
        app()
    except PeftDistError as error:
        print(f"peft-dist: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
