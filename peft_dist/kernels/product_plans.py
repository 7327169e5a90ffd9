"""How products of captured steps are computed, measured once for each size on this very device and kept on disk.

A library chooses a product's kernel by rules of thumb, which fail at single sizes (on an H100 448 rows by gate and up
of an 8B Llama took 291 µs, 512 rows 162), and chooses another one when it shall leave multiprocessors alone. Which of
all that is fast is known by trying.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from peft_dist.kernels.lora_plans import table_name

logger = logging.getLogger(__name__)

Way = Literal["library", "kernel", "beside", "behind", "inside"]
# Of our own kernels that the ways are made of, and of how they are timed: raised when one becomes faster.
WAYS_VERSION = 1
# The adapters of a batch where each is another's.
TIMED_ADAPTERS = 32
WAYS: tuple[Way, ...] = get_args(Way)


class ProductKey(NamedTuple):
    """A size.

    Attributes:
        rows: Of the step.
        in_features, out_features: Of the layers that read one input.
        dtype: Of the activations.
        gated: The layers' outputs are only used as ``activation(first) * second``.
        few: Our kernel for few rows may be taken (``FewRows``).
        slots: Adapters that may be on the device; 0: the layers have none.
        max_rank: Room for their ranks.
    """

    rows: int
    in_features: int
    out_features: tuple[int, ...]
    dtype: str
    gated: bool
    few: bool
    slots: int = 0
    max_rank: int = 0


class ProductPlan(NamedTuple):
    """Attributes:
    way: Without adapters "library" (torch's) or "kernel" (``FewRows.multiply``). With them "beside" (``PartsBeside``),
        "behind" the product, or "inside" of it (``FewRows.add_lora``).
    spared: Multiprocessors that a library's product is planned without.
    """

    way: Way
    spared: int = 0


class ProductPlans:
    """Plans by size, which measure what they lack while they are told to.

    Args:
        path: A file to keep them in; None: nowhere.
        about: What they were measured on and with. A file of another thing is not read, and written over.
        shipped: A file that came with the program; None: there is none. Where it is about the same, what is in it is
            known; about another version of the libraries, it is the best guess for what is not measured.

    Attributes:
        measures: Whether what is asked for is measured.
    """

    def __init__(
        self, path: Path | None = None, about: Mapping[str, Any] | None = None, shipped: Path | None = None
    ) -> None:
        self._path, self._about = path, dict(about or {})
        of_others, guesses = _read(shipped)
        same = of_others == self._about
        self._guesses = _BySize({} if same else guesses)
        self._plans = _BySize((guesses if same else {}) | self._own())
        # A pass that is captured asks what the one before it asked: nothing must be measured, or even tried, in it.
        self._tried: set[ProductKey] = set()
        self._measured: dict[ProductKey, ProductPlan] = {}
        self.measures = False

    def find(self, key: ProductKey, measure: Callable[[], ProductPlan | None]) -> ProductPlan | None:
        """The plan of a size; None where it is not known and is not to be measured now, or cannot be."""
        found = self.known(key)
        if found is None and self.measures and key not in self._tried:
            self._tried.add(key)
            found = measure()
            if found is not None:
                self._plans.add(key, found)
                self._measured[key] = found
        return found

    def known(self, key: ProductKey) -> ProductPlan | None:
        """The plan of a size, as far as it is known.

        Also that of another pool with as many adapters in the batches that were timed: room for more of them, or for
        higher ranks, is not in these.
        """
        return self._plans.nearest(key, min(key.slots, TIMED_ADAPTERS))

    def guess(self, key: ProductKey) -> ProductPlan | None:
        """That of a pool of another size, the nearest, or of other versions; None where nothing is like it."""
        return self._plans.nearest(key) or self._guesses.nearest(key)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While entered, what is asked for is measured; what is known then is on disk afterwards."""
        self.measures = True
        self._tried.clear()
        try:
            yield
        finally:
            self.measures = False
            self._write()

    def stop_measuring(self) -> None:
        """What is not known by now stays so."""
        self.measures = False

    def _own(self) -> dict[ProductKey, ProductPlan]:
        about, plans = _read(self._path)
        return plans if about == self._about else {}

    def _write(self) -> None:
        """Other processes may do the same: each renames a file of its own into place, with what it finds there."""
        if self._path is None or not self._measured:
            return
        plans = self._own() | self._measured
        entries = ",\n  ".join(json.dumps({**key._asdict(), **plan._asdict()}) for key, plan in sorted(plans.items()))
        text = f'{{"about": {json.dumps(self._about)},\n "plans": [\n  {entries}\n]}}\n'
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            Path(name).replace(self._path)
        except OSError as error:
            logger.warning("plans of products are measured at every start: %s cannot be written: %s", self._path, error)
        self._measured = {}


class _BySize:
    """Plans that are found by what is multiplied, whatever the pool."""

    def __init__(self, plans: Mapping[ProductKey, ProductPlan]) -> None:
        self._plans: dict[ProductKey, dict[ProductKey, ProductPlan]] = {}
        for key, plan in plans.items():
            self.add(key, plan)

    def add(self, key: ProductKey, plan: ProductPlan) -> None:
        self._plans.setdefault(_of_any_pool(key), {})[key] = plan

    def nearest(self, key: ProductKey, least_slots: int = 0) -> ProductPlan | None:
        """Of a pool of so many slots or more, those of this number if there are some."""
        alike = self._plans.get(_of_any_pool(key), {})
        if key in alike:
            return alike[key]
        pools = [other for other in alike if other.slots >= least_slots]
        if not pools:
            return None
        return alike[min(pools, key=lambda other: abs(math.log(max(other.slots, 1) / max(key.slots, 1))))]


def shipped_plans(device_name: str) -> Path:
    """Where those are that came with the program, of a card that has some."""
    return Path(__file__).parent / "tuned" / f"products-{table_name(device_name)}"


def _read(path: Path | None) -> tuple[dict[str, Any] | None, dict[ProductKey, ProductPlan]]:
    """(what it is about, plans); None and nothing where there is no such file."""
    try:
        if path is None or not path.is_file():
            return None, {}
        content = json.loads(path.read_text())
        return content["about"], dict(_plan_of(entry) for entry in content["plans"])
    except (ValueError, TypeError, LookupError, OSError) as error:
        logger.warning("plans of products in %s are left out: %s", path, error)
        return None, {}


def _of_any_pool(key: ProductKey) -> ProductKey:
    """One key for all pools, another one for none."""
    return key._replace(slots=min(key.slots, 1), max_rank=0)


def _plan_of(entry: Mapping[str, Any]) -> tuple[ProductKey, ProductPlan]:
    plan = ProductPlan(entry["way"], int(entry["spared"]))
    if plan.way not in WAYS or plan.spared < 0:
        raise ValueError(f"no plan: {entry}")
    named = {name: entry[name] for name in ProductKey._fields}
    return ProductKey(**{**named, "out_features": tuple(entry["out_features"])}), plan
