"""Exported KV for replicas on other hosts: chunks over TCP, asked for one after another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import zmq

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.errors import ConfigError
from peft_dist.core.handover import KVHandle
from peft_dist.runner.shared_memory import MemoryGoneError, open_memory
from peft_dist.worker.kv_address import reachable
from peft_dist.worker.kv_client import CHUNK_BYTES, REQUEST, SILENCE_MS, NoAnswerError, fetch
from peft_dist.worker.nixl_fetching import NAP_SECONDS
from peft_dist.worker.nixl_way import choose_nixl

logger = logging.getLogger(__name__)
_SILENT_SECONDS = 60.0


class TcpTransport:
    """Offers this replica's exports, and fetches others'; on the same host memory is opened instead.

    Who knows the token of an export, which is random and goes only through the orchestrator, may read it. With keys
    what travels is encrypted, and only goes to whoever has them too. By NIXL it travels as it is.
    """

    def __init__(
        self,
        endpoint: str,
        silence_ms: int = SILENCE_MS,
        keys: ClusterKeys | None = None,
        home: str | None = None,
        *,
        with_nixl: bool = False,
    ) -> None:
        """
        Args:
            endpoint: An address of this host that others can reach, such as ``tcp://10.0.0.5:*``.
            keys: Of the cluster; None only where no other machine can reach the address.
            home: The orchestrator's host, for KV of replicas there that are served on every address of it.
            with_nixl: Have KV read by NIXL where both sides can, and go over TCP where not.

        Raises:
            ConfigError: the address cannot be used, or others could listen in.
        """
        if keys is None and not endpoint.startswith("tcp://127."):
            raise ConfigError(f"kv_endpoint={endpoint!r} can be reached from other machines: it needs a key_file")
        self._silence_ms, self._keys, self._home = silence_ms, keys, home
        # By address, until when nobody asks there.
        self._silent_until: dict[str, float] = {}
        self._memories: dict[str, Callable[[], torch.Tensor]] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SocketType.ROUTER)
        self._socket.set(zmq.SocketOption.LINGER, 0)
        if keys is not None:
            keys.serve(self._socket)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy()
            raise ConfigError(f"kv_endpoint={endpoint!r} cannot be used: {error}") from error
        self.address = self._socket.get_string(zmq.SocketOption.LAST_ENDPOINT)
        self._nixl = choose_nixl(endpoint, self._contents, silence_ms) if with_nixl else None
        self._thread = threading.Thread(target=self._serve, name="kv-server", daemon=True)
        self._thread.start()

    def offer(self, token: str, contents: Callable[[], torch.Tensor]) -> str | None:
        """As in ``Transport``."""
        self._memories[token] = contents
        return self.address

    def withdraw(self, token: str) -> None:
        """End what ``offer`` began."""
        self._memories.pop(token, None)

    def open(self, kv: KVHandle) -> torch.Tensor:
        """What another replica exported: uint8 ``[kv.num_bytes]``.

        Raises:
            MemoryGoneError: it is not there any more, or its host does not answer.
        """
        try:
            return open_memory(kv.pid, kv.descriptor, kv.token, kv.num_bytes)
        except MemoryGoneError:
            if kv.address is None:
                raise
        address = reachable(kv.address, self._home)
        # The request stands still meanwhile: one wait for a way that is barred is enough for a while.
        if time.monotonic() < self._silent_until.get(address, 0.0):
            raise MemoryGoneError(f"{address} did not answer a moment ago")
        try:
            contents = self._nixl.fetch(address, kv.token, kv.num_bytes, self._keys) if self._nixl is not None else None
            if contents is not None:
                return contents
            return fetch(address, kv.token, kv.num_bytes, self._silence_ms, self._keys)
        except NoAnswerError:
            now = time.monotonic()
            self._silent_until = {each: until for each, until in self._silent_until.items() if until > now}
            self._silent_until[address] = now + _SILENT_SECONDS
            raise

    def close(self) -> None:
        """End the thread; what is under way is not finished."""
        if self._nixl is not None:
            self._nixl.close()
        # The thread's wait ends with an error then, and it closes its socket, for which this waits.
        self._context.term()
        self._thread.join()
        if self._nixl is not None:
            self._nixl.server.close()

    def _serve(self) -> None:
        try:
            while True:
                if self._nixl is not None and self._nixl.server.is_busy:
                    for answer in self._nixl.server.progress():
                        self._socket.send_multipart(answer)
                    if not self._socket.poll(0):
                        time.sleep(NAP_SECONDS)
                        continue
                parts = self._socket.recv_multipart()
                if len(parts) == 3:
                    self._answer(*parts)
        except zmq.ContextTerminated:
            self._socket.close()

    def _answer(self, identity: bytes, token: bytes, request: bytes) -> None:
        answers = self._nixl.server.answer(identity, token, request) if self._nixl is not None else None
        if answers is None:
            self._socket.send_multipart([identity, request, self._chunk(token, request)], copy=False)
            return
        for answer in answers:
            self._socket.send_multipart(answer)

    def _chunk(self, token: bytes, request: bytes) -> Any:
        """What was asked for; nothing where there is no such memory, or the request is none of ours."""
        contents = self._contents(token) if len(request) == REQUEST.size else None
        if contents is None:
            return b""
        first, length = REQUEST.unpack(request)
        first = min(first, len(contents))
        return contents[first : first + min(length, CHUNK_BYTES)].numpy()

    def _contents(self, token: bytes) -> torch.Tensor | None:
        """Of an export; None where there is none."""
        memory = self._memories.get(token.decode(errors="replace"))
        if memory is None:
            return None
        try:
            return memory()
        except (OSError, RuntimeError) as error:
            # No memory for the copy, or the device has failed: who asks computes it instead.
            logger.warning("KV that another host asks for cannot be copied to this one's memory: %s", error)
            return None
