"""What the engine keeps of a step until its result is collected."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft_dist.core.batch import Batch
from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.request import Request
from peft_dist.engine.switching import Switch


class Submitted(NamedTuple):
    """A batch in flight, whom it serves, and what the cost model learns from it and the switch before it."""

    batch: Batch
    requests: list[Request]
    features: StepFeatures
    switch: Switch | None
    handle: Any
