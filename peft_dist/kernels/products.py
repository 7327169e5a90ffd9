"""What a pass asks before it multiplies: which way is the fastest for these rows and layers on this device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.glue import Activation
from peft_dist.kernels.graph_timing import Timer
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.lora_plans import RANKS
from peft_dist.kernels.product_bench import SPARED, ProductBench, slots_of
from peft_dist.kernels.product_plans import ProductKey, ProductPlan, ProductPlans
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

logger = logging.getLogger(__name__)

_ROWS_TOGETHER, _MOST_TOGETHER = 8, 64


class Products:
    """Plans of products, measured when a pass first asks while they may be.

    Args:
        few_rows, beside, time, spared: As of ``ProductBench``.
    """

    def __init__(
        self,
        plans: ProductPlans,
        few_rows: FewRows | None,
        beside: PartsBeside | None,
        time: Timer,
        spared: Sequence[int] = SPARED,
    ) -> None:
        self._plans, self._few_rows = plans, few_rows
        self._bench = ProductBench(few_rows, beside, time, spared)

    @property
    def measures(self) -> bool:
        """Whether ``measuring`` is entered."""
        return self._plans.measures

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While entered, what is not known yet is measured; other work on the device makes the times wrong."""
        try:
            with self._plans.measuring():
                yield
        finally:
            self._bench.clear()

    def alone(
        self, x: torch.Tensor, out_features: Sequence[int], *, few: bool, activation: Activation | None = None
    ) -> ProductPlan | None:
        """For layers that read x ``[..., in_features]`` and have no adapters in this pass; None: not known.

        Args:
            few: ``FewRows.multiply`` takes them.
            activation: As there.
        """
        rows = x.reshape(-1, x.shape[-1])
        key = _key(rows, out_features, activation if few else None, few)
        if not few:
            return self._find(key, lambda: self._bench.alone(_random(rows), out_features))

        def measure() -> ProductPlan:
            library = self.alone(x, out_features, few=False) or ProductPlan("library")
            return self._bench.alone_or_kernel(_random(rows), out_features, activation, library)

        return self._find(key, measure)

    def adapted(
        self,
        x: torch.Tensor,
        weights: Sequence[LoRALayerWeights | None],
        plan: LoRAPlan,
        *,
        few: bool,
        activation: Activation | None = None,
    ) -> ProductPlan | None:
        """For layers that have these adapters; None: not known.

        Args:
            few: ``FewRows.add_lora`` may take them.
        """
        resident = [w for w in weights if w is not None]
        workspace = resident[0].workspace
        if len(resident) < len(weights) or plan.tiles is None or workspace is None or plan.backend != "triton":
            return None
        if not any(w is resident[0] for w in plan.layers):
            return None
        outputs = [w.B.shape[1] for w in resident]
        rows = x.reshape(-1, x.shape[-1])
        key = _key(rows, outputs, activation, few)._replace(slots=slots_of(resident[0]), max_rank=workspace.max_rank)

        def measure() -> ProductPlan | None:
            alone = self.alone(x, outputs, few=False)
            spared = alone.spared if alone is not None else 0
            return self._bench.adapted(_random(rows), resident, plan, spared, activation, few)

        found = self._find(key, measure)
        if found is None and not few:
            # An adapter that is not finite is never inside.
            other = self._find(key._replace(few=True), lambda: None)
            found = other if other is not None and other.way != "inside" else None
        if found is not None and found.way == "inside" and workspace.ranks > RANKS:
            # It was measured with few ranks; inside, every tile is multiplied for the highest of all.
            other = self._find(key._replace(few=False), lambda: None)
            found = other if other is not None and other.way != "inside" else ProductPlan("beside")
        return found

    def _find(self, key: ProductKey, measure: Callable[[], ProductPlan | None]) -> ProductPlan | None:
        def tried() -> ProductPlan | None:
            try:
                return measure()
            except torch.OutOfMemoryError as error:
                logger.warning("no memory left to measure products in, so the rest keep usual plans: %s", error)
                self._plans.stop_measuring()
                return None

        return self._known(key) or self._plans.find(key, tried) or self._guess(key)

    def _known(self, key: ProductKey) -> ProductPlan | None:
        """Also of a size beside it, which takes as many tiles of rows."""
        return self._plans.known(key) or self._plans.known(key._replace(rows=_padded(key.rows)))

    def _guess(self, key: ProductKey) -> ProductPlan | None:
        return self._plans.guess(key) or self._plans.guess(key._replace(rows=_padded(key.rows)))


def _padded(rows: int) -> int:
    return -(-rows // _ROWS_TOGETHER) * _ROWS_TOGETHER if _ROWS_TOGETHER < rows < _MOST_TOGETHER else rows


def _key(rows: torch.Tensor, outputs: Sequence[int], activation: Activation | None, few: bool) -> ProductKey:
    dtype = str(rows.dtype).removeprefix("torch.")
    return ProductKey(len(rows), rows.shape[1], tuple(outputs), dtype, activation is not None, few)


def _random(rows: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(rows)
