"""The ``peft-dist`` command."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit("peft-dist needs the server's packages: pip install 'peft-dist[server]'") from missing

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import AdapterError, ConfigError, PeftDistError

if TYPE_CHECKING:
    from peft_dist.api.options import ServerOptions
    from peft_dist.orchestrator.replica_process import ReplicaLauncher
    from peft_dist.orchestrator.service import EngineService

API_KEYS_VARIABLE = "PEFT_DIST_API_KEY"
ADMIN_KEY_VARIABLE = "PEFT_DIST_ADMIN_KEY"

logger = logging.getLogger("peft_dist.serve")
# A traceback with the values of local variables could show a key.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_T = TypeVar("_T")


@dataclass(frozen=True)
class ServeSettings:
    """Everything ``serve`` was asked for. Times in seconds."""

    engine: EngineConfig
    http: ServerOptions
    adapters: list[tuple[str, str]]
    host: str
    port: int
    port_file: Path | None
    max_queue: int
    launcher: str
    replica_factory: str | None
    start_timeout: float | None
    shutdown_timeout: float
    log_level: str


@app.command()
def version() -> None:
    """Print the version."""
    from peft_dist import __version__

    typer.echo(__version__)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the base model.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A folder or hub id.")] = None,
    adapter_dir: Annotated[Path | None, typer.Option(help="Load every adapter in it; HTTP loads stay inside.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8000,
    port_file: Annotated[Path | None, typer.Option(help="Write the port here once the server answers.")] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(help="Name of the base; more are aliases.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the base model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and output together, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences in one step.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Most tokens in one step.")] = 2048,
    block_size: Annotated[int, typer.Option(help="Tokens in one KV block.")] = 16,
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks on the device; from memory if not given.")] = None,
    num_host_blocks: Annotated[int, typer.Option(help="KV blocks in host memory, for preemption by swap.")] = 0,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the device's memory to use.")] = 0.9,
    max_loras: Annotated[int, typer.Option(help="Adapters on the device at once.")] = 64,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; more are refused.")] = 1024,
    api_key: Annotated[list[str] | None, typer.Option(help=f"Guards /v1; repeatable. Or {API_KEYS_VARIABLE}.")] = None,
    admin_key: Annotated[str | None, typer.Option(help=f"Guards adapter loads. Or {ADMIN_KEY_VARIABLE}.")] = None,
    allow_hub_load: Annotated[bool, typer.Option("--allow-hub-load", help="HTTP loads may name hub ids.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin adapters, which run code.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the base model's code.")] = False,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file in place of the model's template.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the model.")] = None,
    depth: Annotated[int | None, typer.Option(help="Steps in flight: 0 on CPU and 1 on a GPU if not given.")] = None,
    preemption: Annotated[str, typer.Option(help="auto, recompute or swap.")] = "auto",
    no_prefix_caching: Annotated[bool, typer.Option("--no-prefix-caching", help="Never reuse a prefix's KV.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seeds the requests that bring no seed.")] = None,
    start_timeout: Annotated[float | None, typer.Option(help="Seconds for loading the model; no limit.")] = None,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds that streams get to finish.")] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    launcher: Annotated[str, typer.Option(help="accelerate or plain.", hidden=True)] = "accelerate",
    replica_factory: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve MODEL and its adapters through an OpenAI-compatible API until SIGTERM or Ctrl-C."""
    from peft_dist.api.options import ServerOptions

    more_keys, other_admin = _take_variable(API_KEYS_VARIABLE).split(), _take_variable(ADMIN_KEY_VARIABLE)
    names = served_model_name or []
    settings = ServeSettings(
        engine=EngineConfig(
            model=model,
            served_model_name=names[0] if names else None,
            revision=revision,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=not no_prefix_caching,
            preemption=_one_of("preemption", preemption, ("auto", "recompute", "swap")),
            depth=depth,
            max_loras=max_loras,
            num_threads=threads,
            seed=seed,
            trust_remote_code=trust_remote_code,
        ),
        http=ServerOptions(
            api_keys=tuple(api_key or more_keys),
            admin_key=admin_key if admin_key is not None else other_admin or None,
            adapter_dir=adapter_dir,
            allow_hub_load=allow_hub_load,
            allow_pickle=allow_pickle,
            served_names=tuple(names[1:]),
            chat_template=None if chat_template is None else _read(chat_template),
        ),
        adapters=[_name_and_path(text) for text in adapter or []],
        host=host,
        port=port,
        port_file=port_file,
        max_queue=max_queue,
        launcher=_one_of("launcher", launcher, ("accelerate", "plain")),
        replica_factory=replica_factory,
        start_timeout=start_timeout,
        shutdown_timeout=shutdown_timeout,
        log_level=_one_of("log-level", log_level.lower(), ("debug", "info", "warning", "error")),
    )
    _configure_logging(settings.log_level)
    _run(run_server(settings))


async def run_server(settings: ServeSettings) -> None:
    """Serve until a signal asks to stop, then let streams finish within the grace period and fail the rest.

    Raises:
        ConfigError, AdapterError, EngineDeadError: the server could not be started as asked.
    """
    from peft_dist.api.listener import Listener, write_port
    from peft_dist.orchestrator.core import OrchestratorOptions
    from peft_dist.orchestrator.service import EngineService

    signals = _StopSignals()
    listener = Listener(settings.host, settings.port)
    options = OrchestratorOptions(settings.engine.max_num_seqs, settings.max_queue, settings.engine.seed)
    service = EngineService(_launcher(settings), options, start_timeout=settings.start_timeout)
    try:
        http_app = await _unless(signals.stop, _prepare(settings, service))
        if http_app is None:
            return
        serving = await listener.start(http_app, settings.shutdown_timeout)
        _announce(service, settings, listener.url)
        if settings.port_file is not None:
            write_port(settings.port_file, listener.port)
        await _unless(signals.stop, asyncio.wait({serving}))
        logger.info("Stopping: streams get %g s to finish", settings.shutdown_timeout)
        listener.finish()
        if not await _unless(signals.hurry, service.drain(settings.shutdown_timeout)):
            logger.warning("Some streams did not finish: failing them")
    finally:
        await service.stop()
        await listener.close()


class _StopSignals:
    """SIGTERM or SIGINT sets ``stop``; another one ``hurry``."""

    def __init__(self) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._received)

    def _received(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The result of ``work``, or None when ``event`` is set first; the work is cancelled then."""
    task, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        waiting.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


async def _prepare(settings: ServeSettings, service: EngineService) -> Any:
    """The application, once the replica is ready and the adapters are loaded."""
    from peft_dist.api.server import build_app

    starting = [service.start()]
    if _may_have_tokenizer(settings.engine.model):
        # The import takes as long as a small model takes to load: both at once.
        starting.append(asyncio.to_thread(_import_auto_tokenizer))
    await asyncio.gather(*starting)
    for name, path in settings.adapters:
        await service.load_adapter(name, path, allow_hub=True, allow_pickle=settings.http.allow_pickle)
    await _load_folder(settings, service)
    tokenizer = await asyncio.to_thread(_load_tokenizer, service.model.tokenizer, settings.engine)
    return build_app(service, tokenizer, settings.http)


async def _load_folder(settings: ServeSettings, service: EngineService) -> None:
    folder = settings.http.adapter_dir
    if folder is None:
        return
    for config in sorted(folder.glob("*/adapter_config.json")):
        name = config.parent.name
        try:
            await service.load_adapter(name, name, root=str(folder), allow_pickle=settings.http.allow_pickle)
        except AdapterError as error:
            logger.error("Not served: %s", error)


def _may_have_tokenizer(model: str) -> bool:
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*token*"))


def _import_auto_tokenizer() -> None:
    from transformers import AutoTokenizer  # noqa: F401


def _load_tokenizer(source: str | None, engine: EngineConfig) -> Any | None:
    """The base model's tokenizer; None for a model without one."""
    if source is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, revision=engine.revision, trust_remote_code=engine.trust_remote_code)


def _launcher(settings: ServeSettings) -> ReplicaLauncher:
    from peft_dist.worker.config import DEFAULT_REPLICA_FACTORY
    from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher

    kind = AccelerateLauncher if settings.launcher == "accelerate" else PlainLauncher
    factory = settings.replica_factory or DEFAULT_REPLICA_FACTORY
    launcher: ReplicaLauncher = kind(settings.engine, log_level=settings.log_level, replica_factory=factory)
    return launcher


def _announce(service: EngineService, settings: ServeSettings, url: str) -> None:
    model = service.model
    adapters = ", ".join(f"{spec.name} (rank {spec.max_rank})" for spec in service.adapters()) or "none"
    tokens = model.num_blocks * model.block_size
    logger.info("Model     %s as %r, %s in %s", model.model, model.served_model_name, model.device, model.dtype)
    logger.info("Back ends attention %s, LoRA %s, depth %d", model.attention_backend, model.lora_backend, model.depth)
    logger.info("KV cache  %d blocks of %d = %d tokens", model.num_blocks, model.block_size, tokens)
    logger.info("Limits    %d tokens a request, %d waiting sequences", model.max_model_len, settings.max_queue)
    logger.info("Adapters  %s", adapters)
    logger.info("API keys  %s", "asked for" if settings.http.api_keys else "none: whoever reaches the port is served")
    logger.info("Serving   %s/v1", url)


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    if level != "debug":
        for name in ("uvicorn.error", "httpx", "asyncio"):
            logging.getLogger(name).setLevel(logging.WARNING)


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(work)
    else:
        uvloop.run(work)


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(f"--adapter {text!r} is not NAME=PATH: write for example --adapter sql=adapters/sql")
    return name, path


def _one_of(option: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ConfigError(f"--{option} {value!r} is unknown: use one of {', '.join(choices)}")
    return value


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
