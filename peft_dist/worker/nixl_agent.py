"""The few calls of NIXL that moving KV takes, on host memory, with all of its errors as one kind."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

_BACKEND = "UCX"
_REMEDY = "pip install 'peft-dist[nixl]'"


class NixlError(Exception):
    """NIXL cannot do it, or not now. KV can still come another way."""


@dataclass(frozen=True, slots=True)
class Library:
    """What is used of ``nixl._api``, and the errors that its calls raise."""

    agent: Any
    config: Any
    errors: tuple[type[Exception], ...]


def load_library() -> Library:
    """Raises NixlError, with the remedy, where it is not installed or cannot be loaded."""
    try:
        api = importlib.import_module("nixl._api")
        bindings = importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise NixlError(f"nixl cannot be loaded ({error}): {_REMEDY}") from error
    _have_it_log_as_we_do()
    # Its errors have no base of their own.
    own = (kind for kind in vars(bindings).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return Library(api.nixl_agent, api.nixl_agent_config, (*own, RuntimeError))


def _have_it_log_as_we_do() -> None:
    """It would write to standard output, every step of its start."""
    its = logging.getLogger("nixl")
    its.handlers.clear()
    its.propagate = True
    if "NIXL_LOG_LEVEL" not in os.environ:
        its.setLevel(logging.WARNING)


class NixlAgent:
    """Memory that other agents can read, and into which they are read. For one thread at a time.

    It has no thread of its own, which would spin: whoever is read from has to call ``progress`` meanwhile.

    Attributes:
        memory: uint8 ``[num_bytes]`` on the host. There as long as the agent: where the network's hardware cannot read
            memory, the library reads for others what address they name, without a look at what is registered, and a
            late request for memory that was given back would end the process.
        metadata: By which other agents connect to this one.
    """

    def __init__(self, library: Library, num_bytes: int, devices: str | None = None) -> None:
        """
        Args:
            devices: The network devices that it may use, as UCX names them; None: as UCX chooses.

        Raises:
            NixlError: there is no way to other processes here.
        """
        self._errors = library.errors
        self.memory = torch.empty(num_bytes, dtype=torch.uint8)
        with self._one_kind_of_error():
            self._agent = library.agent(
                f"peft-dist-{secrets.token_hex(16)}", library.config(enable_prog_thread=False, backends=[])
            )
            self._agent.create_backend(_BACKEND, {} if devices is None else {"ucx_devices": devices})
            self._registered = self._agent.register_memory([(self.address, num_bytes, 0, "")], "DRAM")
            self.metadata: bytes = self._agent.get_agent_metadata()

    @property
    def address(self) -> int:
        """Where ``memory`` begins."""
        return self.memory.data_ptr()

    def connect(self, metadata: bytes) -> str:
        """The name of another agent, for ``read``. Raises NixlError."""
        with self._one_kind_of_error():
            name: bytes | str = self._agent.add_remote_agent(metadata)
        return name if isinstance(name, str) else name.decode()

    def disconnect(self, peer: str) -> None:
        """No read from it may be under way: it would still write to memory, and nothing would tell when. Fails silently
        for one that has gone."""
        with contextlib.suppress(NixlError), self._one_kind_of_error():
            self._agent.remove_remote_agent(peer)

    def start_read(self, peer: str, address: int, first: int, length: int) -> Read:
        """Fill ``memory[first : first + length]`` with what ``peer`` has from ``address`` on. Raises NixlError."""
        with self._one_kind_of_error():
            ours = self._agent.get_xfer_descs([(self.address + first, length, 0)], "DRAM")
            theirs = self._agent.get_xfer_descs([(address, length, 0)], "DRAM")
            handle = self._agent.initialize_xfer("READ", ours, theirs, peer)
            return Read(handle, self._agent.transfer(handle))

    def is_done(self, read: Read) -> bool:
        """Whether it has ended, and well. Raises NixlError: it has ended otherwise, and writes nothing any more."""
        try:
            with self._one_kind_of_error():
                if read.is_under_way:
                    read.state = self._agent.check_xfer_state(read.handle)
        except NixlError:
            read.state = "ERR"
            self._release(read)
            raise
        if read.is_under_way:
            return False
        self._release(read)
        if read.state != "DONE":
            raise NixlError("the transfer failed")
        return True

    def progress(self) -> None:
        """Do what others' reads wait for. Raises NixlError."""
        with self._one_kind_of_error():
            self._agent.get_new_notifs()

    def close(self) -> None:
        """Give up all connections, then the memory. Nothing may be called any more."""
        with contextlib.suppress(NixlError), self._one_kind_of_error():
            self._agent.deregister_memory(self._registered)
        del self._agent, self._registered
        # After the agent, which may write to it until then.
        self.memory = torch.empty(0, dtype=torch.uint8)

    def _release(self, read: Read) -> None:
        with contextlib.suppress(NixlError), self._one_kind_of_error():
            read.handle.release()

    @contextlib.contextmanager
    def _one_kind_of_error(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise NixlError(f"{type(error).__name__}: {error}") from error


@dataclass(slots=True)
class Read:
    """One that was started. Released while it is under way it would still write to memory: so it is kept until it ends.

    Attributes:
        state: "PROC" while it is under way, "DONE", or "ERR".
    """

    handle: Any
    state: str

    @property
    def is_under_way(self) -> bool:
        return self.state == "PROC"
