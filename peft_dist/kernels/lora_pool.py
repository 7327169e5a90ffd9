"""Device memory behind adapter slots: pages of rank rows in each layer, and the tables that say whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from peft_dist.kernels.lora_fill import Entry, fill_pages
from peft_dist.kernels.lora_layer import PooledLayer
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.slot_tables import SlotTables
from peft_dist.kernels.types import LoRALayerWeights

LayerTensors = tuple[torch.Tensor, torch.Tensor, float]
"""A ``[r, in_features]``, B ``[out_features, r]`` as PEFT stores them, and the scaling."""

_CPU_PAGE_ROWS = 4
_DEVICE_PAGE_ROWS = 8


def default_page_rows(device: torch.device | str) -> int:
    """Rank rows of one page where nothing else is asked for."""
    return _CPU_PAGE_ROWS if torch.device(device).type == "cpu" else _DEVICE_PAGE_ROWS


class OutOfPagesError(RuntimeError):
    """An adapter needs more pages of a layer than are free."""


@dataclass(slots=True)
class Reservation:
    """Pages that belong to one slot already, but that no kernel reads yet.

    Attributes:
        ranks: By ``lora_index``.
        max_rank: The highest of these.
        pages: By ``lora_index``.
        scaling: Likewise; complete once the pages are filled.
        finite: Every B is known to hold no NaN and no infinity.
    """

    slot: int
    ranks: dict[int, int]
    max_rank: int
    pages: dict[int, list[int]]
    scaling: dict[int, float] = field(default_factory=dict)
    finite: bool = False


class LoRAPool:
    """Adapters by slot in every LoRA layer of one model.

    A layer stores an adapter in as many pages as its rank there needs, and nothing where it does not adapt the
    layer. Any free pages will do, so an adapter fits whenever enough are free, and none is ever moved.

    With ``num_rows`` the buffers are allocated once, and an adapter can be loaded beside running kernels: ``reserve``
    and ``publish`` are cheap and belong to the thread that runs the model, ``fill`` may run on any other. Without, the
    buffers start empty and double when pages run out, and only ``load`` may be used.

    Attributes:
        weights: What kernels read, by ``lora_index``; None while no resident adapter adapts the layer.
        page_rows: Rank rows of one page.
        num_rows: Rows of each layer, whole pages; None when they grow.
        num_slots: Slots that the tables on a GPU have; None where they need none.
        workspace: For kernels on a device; has room for the highest rank that was ever loaded.

    Args:
        grows_tables: A pool that grows has tables on its device too, which move when they or the buffers grow
            (``layout`` tells); a sized one has its tables on a CPU too.
    """

    def __init__(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        page_rows: int | None = None,
        num_rows: int | None = None,
        num_slots: int | None = None,
        *,
        grows_tables: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.page_rows = page_rows or default_page_rows(self.device)
        self.num_rows = None if num_rows is None else num_rows // self.page_rows * self.page_rows
        self.num_slots = num_slots
        has_tables = grows_tables or self.device.type != "cpu"
        self._tables: SlotTables | None = None
        if self.num_rows is not None and num_slots is not None and has_tables:
            self._tables = SlotTables(num_slots, self.num_rows // self.page_rows, self.device)
        self._grows_tables = grows_tables and self._tables is None
        self.workspace = LoRAWorkspace(self.device)
        self.weights: list[LoRALayerWeights | None] = []
        self._layers: list[PooledLayer] = []
        self._resident: dict[int, Reservation] = {}
        self._pending: dict[int, Reservation] = {}

    def add_layer(self, in_features: int, out_features: int, *, embedding: bool = False) -> int:
        """Register a layer and return its ``lora_index``.

        For an embedding ``in_features`` is the number of embeddings; an adapter's A is then ``[r, that]``.
        """
        del embedding  # Both kinds are stored alike; the argument documents the call.
        layer = PooledLayer(
            in_features, out_features, self.device, self.dtype, self.page_rows, grows_tables=self._grows_tables
        )
        layer.weights.workspace = self.workspace
        if self.num_rows is not None:
            layer.grow(self.num_rows // self.page_rows)
            if self._tables is not None:
                layer.share_tables(self._tables)
        self._layers.append(layer)
        self.weights.append(None)
        return len(self._layers) - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers, pages that are free included."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in (layer.weights.A, layer.weights.B))

    @property
    def layout(self) -> tuple[int, int]:
        """Changes with whatever a captured kernel call goes by: addresses, and the room that the ranks need."""
        return sum(layer.moves for layer in self._layers), self.workspace.max_rank

    @property
    def addressed_weights(self) -> list[LoRALayerWeights]:
        """Of every layer, resident adapters or not: tables and buffers of a sized pool never move."""
        return [layer.weights for layer in self._layers]

    def read(self, slot: int) -> dict[int, LayerTensors]:
        """A copy of what a slot holds, by ``lora_index``: A ``[r, in]``, B ``[out, r]``, the scaling."""
        return {index: self.read_layer(slot, index) for index in self.ranks(slot)}

    def read_layer(self, slot: int, index: int) -> LayerTensors:
        """``read`` of one layer that the slot adapts."""
        return self._layers[index].read(slot)

    def is_finite(self, slot: int) -> bool:
        """Whether what a slot holds is known to have no NaN and no infinity."""
        return self._resident[slot].finite

    def ranks(self, slot: int) -> Mapping[int, int]:
        """Of what a slot holds, by ``lora_index``."""
        return self._resident[slot].ranks

    def max_rank(self, slot: int) -> int:
        """The highest of ``ranks``."""
        return self._resident[slot].max_rank

    def num_free_pages(self, index: int) -> int:
        """Of one layer, as far as its buffers reach now."""
        return self._layers[index].pages.num_free

    # In the background

    def reserve(self, slot: int, ranks: Mapping[int, int]) -> Reservation:
        """Take pages for an adapter with these ranks (by ``lora_index``) in an empty slot.

        Raises:
            OutOfPagesError: fewer pages are free than it needs; nothing has changed.
            ValueError: there is no such slot or layer, a rank is below 1, or the slot is in use; likewise.
        """
        self._check_slot(slot)
        if slot in self._resident or slot in self._pending:
            raise ValueError(f"adapter slot {slot} is in use: drop what it holds first")
        for index, rank in ranks.items():
            self._layer(index)
            if rank < 1:
                raise ValueError(f"LoRA layer {index}: rank {rank} must be at least 1")
        self._check_room(ranks)
        max_rank = max(ranks.values(), default=0)
        self.workspace.admit(max_rank)
        pages = {index: self._layers[index].take(rank) for index, rank in ranks.items()}
        reservation = Reservation(slot, dict(ranks), max_rank, pages)
        self._pending[slot] = reservation
        return reservation

    def fill(self, reservation: Reservation, weights: Mapping[int, LayerTensors], *, finite: bool = False) -> None:
        """Copy weights into reserved pages, and touch nothing else: any thread may do it while kernels run.

        On a GPU the copies are queued on the current stream.

        Args:
            weights: By ``lora_index``, for exactly the layers that were reserved.
            finite: Every B is known to be finite in the pool's dtype, so that kernels need not look.

        Raises:
            ValueError: the tensors are not those that the pages were reserved for.
        """
        if weights.keys() != reservation.ranks.keys():
            raise ValueError(f"slot {reservation.slot}: pages were reserved for other layers than {sorted(weights)}")
        for index, tensors in weights.items():
            if self._rank_of(index, tensors) != reservation.ranks[index]:
                raise ValueError(f"LoRA layer {index}: pages were reserved for rank {reservation.ranks[index]}")
        entries = [Entry(self._layers[index], reservation.pages[index], A, B) for index, (A, B, _) in weights.items()]
        with torch.no_grad():
            fill_pages(entries, self.device)
        reservation.scaling = {index: scaling for index, (_, _, scaling) in weights.items()}
        reservation.finite = finite

    def publish(self, reservation: Reservation) -> None:
        """Let kernels see filled pages from the next call on."""
        if (
            self._pending.get(reservation.slot) is not reservation
            or reservation.scaling.keys() != reservation.ranks.keys()
        ):
            raise ValueError(f"slot {reservation.slot}: these pages are not reserved, or not filled")
        del self._pending[reservation.slot]
        self._show(reservation)

    def cancel(self, reservation: Reservation) -> None:
        """Give reserved pages back; nobody may be filling them any more."""
        if self._pending.get(reservation.slot) is not reservation:
            raise ValueError(f"slot {reservation.slot}: these pages are not reserved")
        del self._pending[reservation.slot]
        self._give_back(reservation)

    # At once

    def load(self, slot: int, weights: Mapping[int, LayerTensors]) -> None:
        """Put an adapter into a slot, over whatever it held. ``weights`` is keyed by ``lora_index``.

        Raises:
            OutOfPagesError: it does not fit even in place of what the slot holds; nothing has changed.
            ValueError: a tensor does not fit its layer, or the slot is negative; likewise.
        """
        self._check_slot(slot)
        ranks = {index: self._rank_of(index, tensors) for index, tensors in weights.items()}
        held = self._resident.get(slot)
        if held is None or held.ranks != ranks:
            self._check_room(ranks, held)
            self.drop(slot)
            held = self.reserve(slot, ranks)
            self.fill(held, weights)
            self.publish(held)
        else:
            self.fill(held, weights)
            self._show(held)

    def drop(self, slot: int) -> None:
        """Free a slot's pages in every layer. A slot that holds nothing is left as it is."""
        held = self._resident.pop(slot, None)
        if held is None:
            return
        if self._tables is None:
            for index in held.ranks:
                self._layers[index].hide(slot)
            unadapted = [index for index in held.ranks if not self._layers[index].num_resident]
        else:
            self._tables.hide(slot)
            unadapted = self._tables.unadapted(held.ranks)
            self._count_change(held)
        for index in unadapted:
            self.weights[index] = None
        self._give_back(held)

    def check(self) -> None:
        """Raises RuntimeError unless every page has at most one owner, free pages are the rest, and tables agree."""
        owners = [*self._resident.values(), *self._pending.values()]
        for index, layer in enumerate(self._layers):
            owned = [page for owner in owners for page in owner.pages.get(index, [])]
            resident = {r.slot: (r.ranks[index], r.pages[index]) for r in self._resident.values() if index in r.ranks}
            problem = layer.pages.find_inconsistency(owned) or layer.find_inconsistency(resident)
            if (self.weights[index] is not None) != bool(layer.num_resident):
                problem = "weights are published exactly while an adapter is resident, but are not"
            if problem:
                raise RuntimeError(f"LoRA pool, layer {index}: {problem}")

    def _show(self, reservation: Reservation) -> None:
        self._resident[reservation.slot] = reservation
        slot, ranks, pages, scaling = reservation.slot, reservation.ranks, reservation.pages, reservation.scaling
        if self._tables is None:
            for index, rank in ranks.items():
                self._layers[index].show(slot, rank, pages[index], scaling[index], reservation.finite)
        else:
            self._tables.show(slot, ranks, scaling, pages, finite=reservation.finite)
            self._count_change(reservation)
        for index in ranks:
            self.weights[index] = self._layers[index].weights

    def _count_change(self, reservation: Reservation) -> None:
        for index in reservation.ranks:
            self._layers[index].weights.version += 1

    def _give_back(self, reservation: Reservation) -> None:
        for index, pages in reservation.pages.items():
            self._layers[index].pages.free(pages)

    def _check_slot(self, slot: int) -> None:
        if slot < 0:
            raise ValueError(f"adapter slot {slot} is negative: slots count from 0")
        if self.num_slots is not None and slot >= self.num_slots:
            raise ValueError(f"adapter slot {slot} does not exist: the pool has {self.num_slots}")

    def _check_room(self, ranks: Mapping[int, int], instead_of: Reservation | None = None) -> None:
        """Whether all pages are there, with those of ``instead_of`` counted as free."""
        if self.num_rows is None:
            return
        for index, rank in ranks.items():
            needed = -(-rank // self.page_rows)
            free = self._layers[index].pages.num_free + len(instead_of.pages.get(index, []) if instead_of else [])
            if needed > free:
                raise OutOfPagesError(
                    f"LoRA layer {index}: rank {rank} needs {needed} pages of {self.page_rows} rows, {free} of "
                    f"{self.num_rows // self.page_rows} are free: drop an adapter, or make the pool larger"
                )

    def _layer(self, index: int) -> PooledLayer:
        if not 0 <= index < len(self._layers):
            raise ValueError(f"LoRA layer {index} does not exist: the pool has {len(self._layers)}")
        return self._layers[index]

    def _rank_of(self, index: int, tensors: LayerTensors) -> int:
        layer, (A, B, _) = self._layer(index), tensors
        rank = A.shape[0] if A.dim() == 2 else 0
        if rank < 1 or A.shape != (rank, layer.in_features) or B.shape != (layer.out_features, rank):
            raise ValueError(
                f"LoRA layer {index} takes A [r, {layer.in_features}] and B [{layer.out_features}, r] with r >= 1, "
                f"not A {list(A.shape)} and B {list(B.shape)}"
            )
        return rank
