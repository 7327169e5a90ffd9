"""The process of one rank: connects, builds the replica, runs the loop, and ends as it should."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from peft_dist.core.errors import ConfigError, PeftDistError
from peft_dist.core.messages import Fatal, LoadAdapter, Ready
from peft_dist.worker.allegiance import Allegiance
from peft_dist.worker.bars import quieten_bars
from peft_dist.worker.channel import Channel
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.heart import Heart
from peft_dist.worker.kv_address import host_of
from peft_dist.worker.lifeline import drop_broken_output, watch_standard_input
from peft_dist.worker.loop import WorkerLoop, describe
from peft_dist.worker.rank_pulse import feel
from peft_dist.worker.replica import Replica
from peft_dist.worker.status import EXIT_FENCED, EXIT_ORPHANED, EXIT_REFUSED, tell_status
from peft_dist.worker.tether import end_with_parent
from peft_dist.worker.vigil import Vigil

if TYPE_CHECKING:
    from peft_dist.worker.kv_server import TcpTransport

logger = logging.getLogger(__name__)

_LAST_WORDS_MS = 5000
_FELLOWS_SECONDS = 1.0


def run_worker(config: WorkerConfig, orphaned: Callable[[], None]) -> int:
    """Serve until told to stop; returns the exit status. A failure is reported before it ends the process.

    ``orphaned``: Ends the process, from any thread, when nobody is left to serve.
    """
    channel = Channel(config.endpoint, config.replica_id, config.epoch, config.link_keys())
    has_vigil = config.orphan_timeout is not None or config.silence is not None
    vigil = _keep_vigil(config, orphaned) if has_vigil else None
    heart = Heart(channel, config.heartbeat_seconds, vigil)
    if vigil is not None:
        vigil.on_loss = lambda: _mourn(heart)
    heart.start()
    try:
        return _serve(config, channel, Allegiance(config, channel, heart, vigil), heart)
    except PeftDistError as error:  # It speaks for itself, and where it comes from helps nobody who serves.
        # A server of this host tells it to the same people; those who look after another host see it here.
        is_near = config.endpoint.startswith("ipc:")
        if not is_near:
            logger.error("replica %d cannot go on: %s", config.replica_id, error)
        if not _tell_end(config, channel, error) and is_near:
            logger.error("replica %d cannot go on, and nobody has heard why: %s", config.replica_id, error)
        return 1
    except Exception as error:  # The last thing this process can do for its streams is to say why they end.
        logger.exception("replica %d cannot go on", config.replica_id)
        _tell_end(config, channel, error)
        return 1
    finally:
        heart.stop()
        if vigil is not None:
            vigil.close()
        channel.close()


def run_rank(config: WorkerConfig) -> int:
    """Do what rank 0 of the same launch does, until it is closed; returns the exit status."""
    seconds = 2 * _LAST_WORDS_MS / 1000
    try:
        check_world(config.world_size)
        replica = _build(config)
        server = _serve_kv(config, replica)
        # From now on rank 0 may be waiting for this one, with the streams of its requests.
        seconds = _FELLOWS_SECONDS
        feel(int(os.environ["RANK"]), config.world_size, config.heartbeat_seconds)
        replica.follow()
        if server is not None:
            server.close()
        return 0
    except PeftDistError as error:
        logger.error("a rank of replica %d cannot go on: %s", config.replica_id, error)
        return _await_end(seconds)
    except Exception:
        logger.exception("a rank of replica %d cannot go on", config.replica_id)
        return _await_end(seconds)


def _tell_end(config: WorkerConfig, channel: Channel, error: Exception) -> bool:
    """Whether the orchestrator has heard it."""
    channel.send(Fatal(error=f"Replica {config.replica_id}: {describe(error)}"))
    # The answer is Shutdown: leaving earlier, the bare exit status could overtake these words.
    return channel.await_farewell(_LAST_WORDS_MS)


def _await_end(seconds: float) -> int:
    # The launcher ends all ranks with the first: rank 0, if it fails of the same, gets the time to say what it knows.
    # Its end is ours.
    threading.Event().wait(seconds)
    return 1


def _serve(config: WorkerConfig, channel: Channel, allegiance: Allegiance, heart: Heart) -> int:
    check_world(config.world_size)
    replica = _build(config)
    if config.world_size > 1:
        heart.is_whole = feel(0, config.world_size, config.heartbeat_seconds)
    server = _serve_kv(config, replica)
    channel.send(Ready(model=replica.model_info, pid=os.getpid(), costs=replica.engine.detail().costs))
    loop = WorkerLoop(replica, channel, find_adapter, allegiance=allegiance)
    try:
        loop.run()
    finally:
        if server is not None:
            server.close()
    # Not after a failure: an engine that failed may fail again, and its first words are the ones that count.
    replica.close()
    if loop.is_refused:
        return EXIT_REFUSED
    return EXIT_FENCED if loop.is_fenced else 0


def _build(config: WorkerConfig) -> Replica:
    build = config.load_factory()
    # It has imported what there is to be quieted.
    quieten_bars()
    replica: Replica = build(config.engine)
    return replica


def _serve_kv(config: WorkerConfig, replica: Replica) -> TcpTransport | None:
    """Have this rank's exports read from other hosts, where that is asked for."""
    with_nixl = config.engine.kv_transfer == "nixl"
    if config.kv_endpoint is None:
        if with_nixl:
            logger.info("kv_transfer='nixl' changes nothing: no replica of another host can reach this one's KV")
        return None
    from peft_dist.worker.kv_server import TcpTransport

    home = host_of(config.endpoint) if config.endpoint.startswith("tcp://") else None
    server = TcpTransport(config.kv_endpoint, keys=config.keys(), home=home, with_nixl=with_nixl)
    replica.use_transport(server)
    return server


def _keep_vigil(config: WorkerConfig, orphaned: Callable[[], None]) -> Vigil:
    vigil = Vigil(config.silence, config.orphan_timeout, orphaned, is_watched=config.guest is None)
    if config.guest is None and config.orphan_timeout is not None:
        watch_standard_input(lambda: vigil.lose(0, "the orchestrator is gone"))
    return vigil


def _mourn(heart: Heart) -> None:
    drop_broken_output()
    heart.hurry()


def check_world(world_size: int) -> None:
    """Raises ConfigError when the launcher started another number of processes than were asked for."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != world_size:
        raise ConfigError(
            f"the launcher started {started} processes where {world_size} were asked for: "
            "check the options and the environment of accelerate launch"
        )


def find_adapter(command: LoadAdapter) -> Path:
    """The local folder of the adapter that a command names. Raises AdapterError."""
    from peft_dist.runner.adapter_source import resolve_adapter

    folder: Path = resolve_adapter(
        command.path,
        root=None if command.root is None else Path(command.root),
        allow_hub=command.allow_hub,
        allow_pickle=command.allow_pickle,
    )
    return folder


def _terminate(signum: int, frame: FrameType | None) -> None:
    # An exception could surface anywhere, and whoever sends this signal expects nothing more from us.
    os._exit(128 + signum)


def main(argv: list[str]) -> int:
    """``python -m peft_dist.worker CONFIG.json``, with the lifeline of whoever started it as standard input."""
    if len(argv) != 1:
        print("usage: python -m peft_dist.worker CONFIG.json", file=sys.stderr)
        return 2
    config = WorkerConfig.read(Path(argv[0]))
    rank = int(os.environ.get("RANK", "0")) if config.world_size > 1 else 0
    name = f"replica {config.replica_id}" + (f" rank {rank}" if rank else "")
    # What all ranks do alike is told once.
    level = "WARNING" if rank and config.log_level.upper() == "INFO" else config.log_level.upper()
    logging.basicConfig(level=level, format=f"%(asctime)s %(levelname)s [{name}] %(message)s")
    if config.world_size == 1:
        # A rank may be waiting for others inside of a library, where no handler runs: the system ends it.
        signal.signal(signal.SIGTERM, _terminate)
    folder = Path(argv[0]).parent

    def orphaned() -> None:
        logger.error("nobody is left to work for: this worker ends")
        tell_status(folder, EXIT_ORPHANED)
        # Not an exception: the main thread may be inside a long computation, and there is nobody to report to.
        os._exit(EXIT_ORPHANED)

    ends_with_starter = config.orphan_timeout is None or config.guest is not None
    if ends_with_starter:
        # Whoever started it holds the other end: the orchestrator, or the one that asked to join.
        watch_standard_input(orphaned)
    # Torch's launcher puts ranks into sessions of their own, where signals for its process group do not come.
    if ends_with_starter or config.world_size > 1:
        end_with_parent()
    if rank:
        return run_rank(config)
    status = run_worker(config, orphaned)
    tell_status(folder, status)
    return status
