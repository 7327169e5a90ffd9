"""A small model with adapters and PEFT's answers, however many tests compare with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from tests.e2e.test_exactness import make_adapters
from tests.oracle import Answer, PeftOracle
from tests.tiny_models import make_model


class Known:
    """What PEFT answers with a model and some adapters; asked once for each answer.

    Attributes:
        base: Folder of the model.
    """

    def __init__(self, base: Path, model: PreTrainedModel, adapters: Mapping[str, Path]) -> None:
        self.base, self.adapters = base, dict(adapters)
        self.oracle = PeftOracle(model, adapters)
        self._answers: dict[tuple[object, ...], Answer] = {}

    @classmethod
    def of_family(cls, family: str, folder: Path) -> Known:
        model = make_model(family, folder / "base")
        return cls(folder / "base", model, make_adapters(family, model, folder))

    def answer(self, prompt: Sequence[int], adapter: str | None, num_tokens: int) -> Answer:
        """As the oracle's."""
        key = (tuple(prompt), adapter, num_tokens)
        if key not in self._answers:
            self._answers[key] = self.oracle.answer(prompt, adapter, num_tokens)
        return self._answers[key]
