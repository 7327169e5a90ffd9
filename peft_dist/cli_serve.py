"""What ``peft-dist serve`` does once its options are known."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_dist import cli_adapters
from peft_dist.cli_announce import announce, tell_of_the_start
from peft_dist.cli_checks import (
    check_adapters,
    check_decision_log,
    check_file_limit,
    check_gpus,
    check_names,
    check_port_file,
)
from peft_dist.core.collector import COLLECT_AFTER, freeze_heap
from peft_dist.core.config import EngineConfig, check_pinned
from peft_dist.core.errors import ConfigError
from peft_dist.core.waiting import StopSignals, unless

if TYPE_CHECKING:
    from peft_dist.api.listener import Tls
    from peft_dist.api.options import ServerOptions
    from peft_dist.api.unread import UnreadWatch
    from peft_dist.orchestrator.core import OrchestratorOptions
    from peft_dist.orchestrator.guests import Invitation
    from peft_dist.orchestrator.link import Link
    from peft_dist.orchestrator.replica_process import ReplicaLauncher, ReplicaProcess
    from peft_dist.orchestrator.service import EngineService
    from peft_dist.placement.placer import MigrationKind
    from peft_dist.placement.triggers import TriggerSettings
    from peft_dist.worker.ray_cluster import RaySettings
    from peft_dist.worker.state_folder import StateFolder

logger = logging.getLogger("peft_dist.serve")
# Signs of life that may be missing before a replica counts as hung.
_BEATS = 5


@dataclass(frozen=True)
class ServeSettings:
    """Everything ``serve`` was asked for. Times in seconds."""

    engine: EngineConfig
    http: ServerOptions
    generation_config: str
    adapters: list[tuple[str, str]]
    host: str
    port: int
    port_file: Path | None
    tls: Tls | None
    max_queue: int
    num_replicas: int
    migration: MigrationKind
    triggers: TriggerSettings
    handover_memory: int
    planner_limit: float
    restart: bool
    heartbeat_timeout: float
    step_timeout: float
    launcher: str
    replica_factory: str | None
    listen: str | None
    cluster_key: Path | None
    ray: RaySettings | None
    start_timeout: float | None
    shutdown_timeout: float
    state_dir: Path | None
    orphan_timeout: float
    log_level: str


async def run_server(settings: ServeSettings) -> None:
    """Serve until a signal asks to stop, then let streams finish within the grace period and fail the rest.

    Raises:
        ConfigError, AdapterError, EngineDeadError: the server could not be started as asked.
    """
    check_pinned(settings.engine, [name for name, _ in (*settings.adapters, *cli_adapters.of_folder(settings))])
    base = settings.engine.served_model_name or Path(settings.engine.model).name
    check_names(settings.adapters, (base, *settings.http.served_names))
    check_port_file(settings.port_file)
    check_decision_log(settings.engine.decision_log)
    if settings.ray is None:
        check_gpus(settings.num_replicas, settings.engine)
    check_file_limit(settings.num_replicas * settings.engine.max_num_seqs + settings.max_queue)
    if settings.ray is None:
        await _serve(settings, None)
        return
    # Ray has handlers of its own for signals: ours come later.
    with _on_ray(settings, settings.ray) as cluster:
        await _serve(settings, cluster)


async def _serve(settings: ServeSettings, cluster: _Cluster | None) -> None:
    """``cluster`` None: This host."""
    from peft_dist.api.listener import Listener, write_port
    from peft_dist.api.unread import UnreadWatch
    from peft_dist.orchestrator.service import EngineService

    signals = StopSignals()
    listener = Listener(settings.host, settings.port, settings.tls)
    launcher, link, left, state = cluster or await _on_this_host(settings)
    service = EngineService(
        launcher,
        _options(settings),
        num_replicas=settings.num_replicas,
        start_timeout=settings.start_timeout,
        planner_limit=settings.planner_limit,
        invitation=_invitation(settings),
        link=link,
        left=left,
    )
    try:
        if cluster is None and settings.num_replicas and not left:
            # Those of other hosts may have other folders, those that are left what is no longer there.
            check_adapters(settings.adapters)
        tell_of_the_start(service, settings)
        unread = UnreadWatch(settings.http.unread_timeout)
        http_app = await unless(signals.stop, _prepare(settings, service, unread))
        if http_app is None:
            return
        # Libraries and what was loaded live as long as this process. Left to the collector, they would stop every
        # stream for a quarter of a second now and then.
        freeze_heap()
        # Nor is all that requests hold to be looked through whenever some steps' tokens have come and gone: with 512
        # streams that took 60 to 80 ms, every 1.3 s.
        gc.set_threshold(*COLLECT_AFTER)
        serving = await listener.start(http_app, settings.shutdown_timeout, unread)
        announce(service, settings, listener.url, state)
        if settings.port_file is not None:
            write_port(settings.port_file, listener.port)
        await unless(signals.stop, asyncio.wait({serving}))
        logger.info("Stopping: streams get %g s to finish", settings.shutdown_timeout)
        listener.finish()
        if not await unless(signals.hurry, service.drain(settings.shutdown_timeout)):
            logger.warning("Some streams did not finish: failing them")
    finally:
        await service.stop()
        await listener.close()
        if state is not None:
            state.close()


async def _prepare(settings: ServeSettings, service: EngineService, unread: UnreadWatch) -> Any:
    """The application, once the replicas are ready and the adapters are loaded."""
    from peft_dist.api.server import build_app

    starting = [service.start()]
    if _may_have_tokenizer(settings.engine.model):
        # The import takes as long as a small model takes to load: both at once.
        starting.append(asyncio.to_thread(_import_auto_tokenizer))
    await asyncio.gather(*starting)
    refused = await cli_adapters.load_all(settings, service)
    tokenizer = await asyncio.to_thread(_load_tokenizer, service.model.tokenizer, settings.engine)
    options = settings.http
    if tokenizer is not None or settings.generation_config == "auto":
        options = await asyncio.to_thread(_with_sampling_defaults, settings)
    return build_app(service, tokenizer, options, unread, refused)


def _with_sampling_defaults(settings: ServeSettings) -> ServerOptions:
    """As of ``--generation-config``."""
    from peft_dist.api.sampling_defaults import in_words, recommended

    follows = settings.generation_config == "auto"
    try:
        found = recommended(settings.engine.model, settings.engine.revision, only_local=not follows)
    except ConfigError as error:
        if follows:
            raise
        logger.warning("%s", error)
        return settings.http
    if follows:
        logger.info("Sampling  %s, where requests say nothing", in_words(found) or "OpenAI's defaults")
        return replace(settings.http, sampling_defaults=found)
    if found:
        logger.info("Sampling  OpenAI's defaults; the model recommends %s: --generation-config auto", in_words(found))
    return settings.http


def _may_have_tokenizer(model: str) -> bool:
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*token*"))


def _import_auto_tokenizer() -> None:
    from transformers import AutoTokenizer  # noqa: F401


def _load_tokenizer(source: str | None, engine: EngineConfig) -> Any | None:
    """The base model's tokenizer; None for a model without one."""
    if source is None:
        return None
    from peft_dist.api.tokenizing import load_tokenizer

    return load_tokenizer(source, revision=engine.revision, trust_remote_code=engine.trust_remote_code)


def _open_state(settings: ServeSettings) -> StateFolder | None:
    """Where workers are found again; None where they end with this process."""
    from peft_dist.worker.state_folder import StateFolder, UnusableFolderError, default_path

    path = settings.state_dir or default_path(settings.port)
    if path is None or not settings.orphan_timeout:
        return None
    try:
        return StateFolder(path)
    except UnusableFolderError as error:
        if settings.state_dir is not None:
            raise
        logger.warning("The workers end with this process if it is killed: %s", error)
        return None


def _options(settings: ServeSettings) -> OrchestratorOptions:
    from peft_dist.core.restarts import RestartPolicy
    from peft_dist.orchestrator.core import OrchestratorOptions

    return OrchestratorOptions(
        max_num_seqs=settings.engine.max_num_seqs,
        max_queue=settings.max_queue,
        seed=settings.engine.seed,
        start_timeout=settings.start_timeout,
        # A replica that only seems to hang had better be left alone where no other takes its place.
        heartbeat_timeout=settings.heartbeat_timeout if settings.restart else None,
        step_timeout=settings.step_timeout if settings.restart else None,
        restart=RestartPolicy() if settings.restart else None,
        migration=settings.migration,
        triggers=settings.triggers,
        max_handover_bytes=settings.handover_memory,
        prefix_caching=settings.engine.enable_prefix_caching,
        # Whole models are what is kept on the device there.
        sends_ahead=settings.engine.exec_type != "vllm",
    )


def _invitation(settings: ServeSettings) -> Invitation | None:
    from peft_dist.core.cluster_keys import ClusterKeys
    from peft_dist.orchestrator.guests import Invitation
    from peft_dist.worker.config import DEFAULT_REPLICA_FACTORY

    if settings.listen is None:
        return None
    return Invitation(
        settings.listen,
        settings.engine,
        settings.replica_factory or DEFAULT_REPLICA_FACTORY,
        keys=None if settings.cluster_key is None else ClusterKeys.read(settings.cluster_key),
        heartbeat_seconds=settings.heartbeat_timeout / _BEATS,
        **({} if settings.start_timeout is None else {"start_timeout": settings.start_timeout}),
    )


class _Cluster(NamedTuple):
    """What starts the replicas, the socket that they connect to if it is not the usual one, and those that are left
    from an earlier server, which is known by a folder."""

    launcher: ReplicaLauncher
    link: Link | None = None
    left: Mapping[int, ReplicaProcess] = {}
    state: StateFolder | None = None


async def _on_this_host(settings: ServeSettings) -> _Cluster:
    from peft_dist.orchestrator.link import Link
    from peft_dist.worker.launcher import LAUNCHERS
    from peft_dist.worker.survivors import find_survivors

    state, launcher_type = _open_state(settings), LAUNCHERS[settings.launcher]
    further: dict[str, Any] = {"kv_endpoint": _kv_endpoint(settings), "silence": settings.heartbeat_timeout}
    options = {"key_file": None if settings.cluster_key is None else str(settings.cluster_key.absolute())}
    if state is None:
        return _Cluster(launcher_type(settings.engine, further=further, **options, **_for_launcher(settings)))
    further |= {"orphan_timeout": settings.orphan_timeout}
    launcher = launcher_type(settings.engine, state=state, further=further, **options, **_for_launcher(settings))
    left = await find_survivors(state, {i: launcher.launch(i) for i in range(settings.num_replicas)})
    return _Cluster(launcher, Link.local(state.socket), left, state)


@contextmanager
def _on_ray(settings: ServeSettings, ray: RaySettings) -> Iterator[_Cluster]:
    from peft_dist.core.cluster_keys import ClusterKeys
    from peft_dist.orchestrator.link import Link
    from peft_dist.worker import ray_cluster
    from peft_dist.worker.ray_launcher import RayLauncher

    host = ray_cluster.connect(ray)
    try:
        # Of this server's life: nobody else needs them, and they reach the replicas through Ray.
        keys = ClusterKeys.make()
        silence = settings.heartbeat_timeout
        launcher = RayLauncher(settings.engine, ray, keys, silence=silence, **_for_launcher(settings))
        yield _Cluster(launcher, Link.listening(f"tcp://{host}:0", keys))
    finally:
        ray_cluster.disconnect()


def _kv_endpoint(settings: ServeSettings) -> str | None:
    """Where replicas that join read the KV of this host's."""
    from peft_dist.worker.kv_address import of_server

    if settings.listen is None:
        return None
    return of_server(settings.listen, has_keys=settings.cluster_key is not None)


def _for_launcher(settings: ServeSettings) -> dict[str, Any]:
    from peft_dist.worker.config import DEFAULT_REPLICA_FACTORY

    return {
        "log_level": settings.log_level,
        "replica_factory": settings.replica_factory or DEFAULT_REPLICA_FACTORY,
        "heartbeat_seconds": settings.heartbeat_timeout / _BEATS,
        "num_replicas": settings.num_replicas,
    }


def configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    if level != "debug":
        for name in ("uvicorn.error", "httpx", "asyncio"):
            logging.getLogger(name).setLevel(logging.WARNING)
