"""What one patched PeftModel knows, and how its calls with ``adapter_names`` run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel

from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.patches import coverage
from peft_dist.patches.adapter_rows import call_batch_size, expand_for_peft, longest_length, prompt_length
from peft_dist.patches.capturable import capture_reason, model_state
from peft_dist.patches.decode_graphs import DecodeGraphs, capture_for
from peft_dist.patches.live_weights import LiveWeights
from peft_dist.patches.lora_layers import join_siblings
from peft_dist.patches.lora_wrapping import restore_class, sees_kept_rows, swap_class
from peft_dist.patches.paging import paging_reason
from peft_dist.patches.peft_hooks import hooks_taken_back
from peft_dist.patches.selective_call import Lengths, SelectiveCall, intercept

logger = logging.getLogger("peft_dist.patches")


class DropIn:
    """State of one patched model. A copy or an unpickled model starts with a fresh one.

    Calls from several threads take turns, as they share the model's slots.
    """

    def __init__(self) -> None:
        self.weights = LiveWeights()
        self.graphs = DecodeGraphs(capture_for)
        self._lock = threading.RLock()
        self._running = threading.local()
        self._logged: set[str] = set()

    def __reduce__(self) -> tuple[type[DropIn], tuple[()]]:
        return DropIn, ()

    def rescan(self, model: PeftModel) -> None:
        """Give layers that PEFT made since the last look their selective class."""
        base = model.get_base_model()
        swapped = [(path, layer) for path, layer in coverage.tuner_layers(base) if swap_class(layer)]
        for path, layer in swapped:
            layer.__dict__["is_output"] = sees_kept_rows(base, path, layer)
        if swapped:
            join_siblings(base)

    def restore(self, model: PeftModel) -> None:
        """Give every layer its own class back, and the memory that was kept."""
        self.graphs.clear()
        for _, layer in coverage.tuner_layers(model.get_base_model()):
            restore_class(layer)

    def call(
        self, model: PeftModel, original: Callable[..., Any], names: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run PEFT's ``forward`` or ``generate`` (``original``) as one selective batch, or leave it to PEFT."""
        generates = original.__name__ == "generate"
        with self._lock:
            selective = self._prepare(model, names, args, kwargs, generates)
            if isinstance(selective, SelectiveCall):
                return self._run(model, selective, original, args, kwargs)
            self._log(selective)
            if generates:
                names = expand_for_peft(names, kwargs, getattr(model, "generation_config", None))
            # PEFT's hooks are the model's: another call beside this one would go through them.
            with hooks_taken_back(model):
                return original(*args, adapter_names=names, **kwargs)

    def _prepare(
        self, model: PeftModel, names: Any, args: tuple[Any, ...], kwargs: dict[str, Any], generates: bool
    ) -> SelectiveCall | str:
        """A call that is ready to run, or the reason why PEFT has to run it."""
        if reason := coverage.model_reason(model, generates):
            return f"{reason}: PEFT's own path runs"
        self.rescan(model)
        base = model.get_base_model()
        layers = list(coverage.tuner_layers(base))
        if reason := coverage.layers_reason(layers):
            return f"{reason}: PEFT's own path runs"
        known = coverage.known_adapters(layers)
        names = coverage.check_names(names, known, call_batch_size(args, kwargs, generates))
        wanted = set(names) - {coverage.BASE_NAME}
        weights, reason = coverage.collect_weights(layers, wanted, set(model.active_adapters))
        if reason:
            return f"{reason}: PEFT's own path runs"
        pool = self.weights.refresh([layer for _, layer in layers], weights, known)
        slots = np.array([self.weights.slots.get(name, -1) for name in names], np.int32)
        if not generates:
            return SelectiveCall(base, slots, pool.weights, pages=False)
        pages = self._pages(model, kwargs)
        lengths = _lengths(model, args, kwargs)
        return SelectiveCall(
            base, slots, pool.weights, pages, lengths, self._open_graphs(base, pool) if pages else None
        )

    def _open_graphs(self, base: PreTrainedModel, pool: LoRAPool) -> DecodeGraphs | None:
        """What replays the call's decode passes; None where they cannot be captured."""
        is_inner = getattr(self._running, "call", None) is not None
        if is_inner or not self.graphs.can_capture(base.device):
            return None
        if reason := capture_reason(base, pool.weights):
            logger.info("decode passes are not captured: %s", reason)
            return None
        self.graphs.open((model_state(base), pool, pool.layout))
        return self.graphs

    def _pages(self, model: PeftModel, kwargs: dict[str, Any]) -> bool:
        reason = paging_reason(model.get_base_model(), kwargs)
        self._log_unpaged(reason)
        return reason is None

    def _log_unpaged(self, reason: str | None) -> None:
        if reason:
            self._log(f"{reason}: the adapters run as one batch, attention and cache are Hugging Face's")

    def _run(
        self,
        model: PeftModel,
        selective: SelectiveCall,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        outer = getattr(self._running, "call", None)
        self._running.call = selective
        try:
            if outer is not None:
                result = original(*args, **kwargs)
            else:
                with intercept(model.get_base_model(), self._forward):
                    result = original(*args, **kwargs)
            selective.finish(result)
            return result
        finally:
            self._running.call = outer
            if outer is None:
                self.graphs.close()
            self._log_unpaged(selective.refusal)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The base model's forward: rows have adapters in the thread whose call runs, and in no other."""
        selective: SelectiveCall | None = getattr(self._running, "call", None)
        return forward(*args, **kwargs) if selective is None else selective.run(forward, *args, **kwargs)

    def _log(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            logger.warning(line)


def _lengths(model: PeftModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lengths:
    prompt = prompt_length(args, kwargs)
    return Lengths(prompt, longest_length(prompt or 1, kwargs, getattr(model, "generation_config", None)))
