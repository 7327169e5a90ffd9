"""What rank 0 does, told to the others, who do the same with their part of the weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec
import zmq

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch
from peft_dist.core.handover import KVHandle
from peft_dist.runner.rank_group import RankGroup


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a batch."""

    batch: Batch


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Finish the oldest batch that was started."""


class Switch(msgspec.Struct, frozen=True, tag=True):
    """Merge this adapter, or go back to the base."""

    spec: AdapterSpec | None


class Forget(msgspec.Struct, frozen=True, tag=True):
    """These sequences have ended."""

    request_ids: list[str]


class Register(msgspec.Struct, frozen=True, tag=True):
    """An adapter may be loaded from now on."""

    spec: AdapterSpec
    allow_pickle: bool


class Capture(msgspec.Struct, frozen=True, tag=True):
    """Capture the steps that registered adapters need."""


class CaptureNext(msgspec.Struct, frozen=True, tag=True):
    """Capture one more of those steps."""


class Rehearse(msgspec.Struct, frozen=True, tag=True):
    """Run a batch that has kernels compiled."""

    lengths: list[int]
    tile_rows: int
    corrected: bool


class PrepareMerge(msgspec.Struct, frozen=True, tag=True):
    """Take the memory for merging it. All ranks meet."""

    spec: AdapterSpec


class StartLoad(msgspec.Struct, frozen=True, tag=True):
    """Read a registered adapter into a slot, in the background."""

    spec: AdapterSpec
    slot: int


class Settle(msgspec.Struct, frozen=True, tag=True):
    """Wait for the end of a load, which rank 0 has seen. All ranks meet."""

    slot: int


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Empty a slot."""

    slot: int


class Keep(msgspec.Struct, frozen=True, tag=True):
    """Keep the adapter's weights on the host."""

    content_hash: str


class Release(msgspec.Struct, frozen=True, tag=True):
    """End ``Keep``."""

    content_hash: str


class Discard(msgspec.Struct, frozen=True, tag=True):
    """Free what the host keeps of an adapter."""

    content_hash: str


class StartExport(msgspec.Struct, frozen=True, tag=True):
    """Copy this rank's part of KV blocks to memory of its own, beside the steps."""

    key: int
    blocks: list[int]
    on_host: bool
    ahead: bool


class StartImport(msgspec.Struct, frozen=True, tag=True):
    """Fill blocks from what the same rank of another replica exported."""

    key: int
    kv: KVHandle
    blocks: list[int]


class SettleTransfer(msgspec.Struct, frozen=True, tag=True):
    """Wait for the end of a copy, which rank 0 has seen. All ranks meet."""

    key: int


class EndExport(msgspec.Struct, frozen=True, tag=True):
    """Free the memory of an export."""

    key: int


class Clear(msgspec.Struct, frozen=True, tag=True):
    """Back to the base, and every slot empty."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The replica is closed."""


RankMessage = (
    Submit
    | Collect
    | Switch
    | Forget
    | Register
    | Capture
    | CaptureNext
    | Rehearse
    | PrepareMerge
    | StartLoad
    | Settle
    | Drop
    | Keep
    | Release
    | Discard
    | StartExport
    | StartImport
    | SettleTransfer
    | EndExport
    | Clear
    | Stop
)


class RankChannel:
    """From rank 0 to the others, in order, on one machine. To be opened by all at once.

    Rank 0 never waits here: what is under way is bounded by the steps in flight, in which all ranks meet.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._context = zmq.Context()
        self._folder: Path | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[RankMessage] = msgspec.msgpack.Decoder(RankMessage)
        if ranks.rank == 0:
            # Readable by this user alone.
            self._folder = Path(tempfile.mkdtemp(prefix="peft-dist-ranks-"))
            folder = ranks.agree(str(self._folder))[0]
            self._sockets = [self._open(zmq.PUSH) for _ in range(1, ranks.size)]
            for rank, socket in enumerate(self._sockets, start=1):
                socket.bind(f"ipc://{folder}/{rank}")
        else:
            folder = ranks.agree(None)[0]
            self._sockets = [self._open(zmq.PULL)]
            self._sockets[0].connect(f"ipc://{folder}/{ranks.rank}")

    def tell(self, message: RankMessage) -> None:
        """To every other rank."""
        data = self._encoder.encode(message)
        for socket in self._sockets:
            socket.send(data)

    def hear(self) -> RankMessage:
        """The next message; waits for it."""
        return self._decoder.decode(self._sockets[0].recv())

    def close(self) -> None:
        """What was told gets a moment to arrive."""
        self._context.destroy(linger=1000)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        return socket
