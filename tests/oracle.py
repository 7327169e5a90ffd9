"""PEFT itself as the oracle, and what "identical" means (docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peft_dist import LLM
from peft_dist.core.batch import Batch, ScheduledSequence
from peft_dist.runner.inputs import PackedInputs
from peft_dist.runner.step_variants import CapturedStep

# Two logits closer than this share of their scale may change places with the order of summation.
TIE = 2e-5
LOGITS = 1e-4


@dataclass(slots=True)
class Answer:
    """Greedy tokens, and the logits ``[tokens, vocab]`` that they were drawn from."""

    tokens: list[int]
    logits: torch.Tensor


class PeftOracle:
    """Answers one prompt at a time, with one adapter set, as PEFT's users do."""

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, str | Path]) -> None:
        self.model: PreTrainedModel | PeftModel = model
        for name, path in adapters.items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(path), name)
            else:
                self.model = PeftModel.from_pretrained(model, str(path), adapter_name=name)
        self.model.eval()

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], adapter: str | None, num_tokens: int) -> Answer:
        """``num_tokens`` greedy tokens; an end of sequence does not stop it."""
        if adapter is None and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                return self._generate(prompt, num_tokens)
        if adapter is not None:
            self.model.set_adapter(adapter)
        return self._generate(prompt, num_tokens)

    @torch.no_grad()
    def logits_after(self, tokens: Sequence[int], adapter: str | None) -> torch.Tensor:
        """``[vocab]`` logits of the position after ``tokens``."""
        return self.answer(tokens, adapter, 1).logits[0]

    def _generate(self, prompt: Sequence[int], num_tokens: int) -> Answer:
        ids = torch.tensor([list(prompt)])
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return Answer(output.sequences[0, len(prompt) :].tolist(), torch.stack(output.logits)[:, 0])


def is_tie(logits: torch.Tensor, token: int) -> bool:
    """Whether ``token``'s logit lies within ``TIE`` of the logits' scale below the highest."""
    return float(logits.max() - logits[token]) <= TIE * float(logits.abs().max())


class Recorder:
    """Writes down the logits that each request of an ``LLM`` draws from, in captured steps too."""

    def __init__(self, llm: LLM) -> None:
        self.logits: dict[str, list[torch.Tensor]] = {}
        runner, graphs = llm._open.runner, llm._open.runner.graphs
        run_eagerly = runner._logits

        def record(inputs: PackedInputs) -> torch.Tensor:
            logits = run_eagerly(inputs)
            self._write(inputs.sampled, logits)
            return logits

        runner._logits = record
        if graphs is not None:
            replay = graphs.run

            def record_captured(batch: Batch, *arguments: Any) -> CapturedStep:
                step = replay(batch, *arguments)
                self._write([sequence for sequence in batch.sequences if sequence.samples], step.logits)
                return step

            graphs.run = record_captured  # type: ignore[method-assign]

    def _write(self, sequences: Sequence[ScheduledSequence], logits: torch.Tensor) -> None:
        for row, sequence in enumerate(sequences):
            self.logits.setdefault(sequence.request_id.rsplit("-", 1)[0], []).append(logits[row].clone())


def differences(
    ours: Sequence[int], answer: Answer, oracle: PeftOracle, prompt: Sequence[int], adapter: str | None
) -> tuple[int, int]:
    """How many tokens are ties, and how many wrong; from the first difference on, the oracle follows our tokens."""
    if list(ours) == answer.tokens:
        return 0, 0
    ties = wrong = 0
    first = common_prefix(ours, answer.tokens)
    for i in range(first, len(ours)):
        logits = answer.logits[i] if i == first else oracle.logits_after([*prompt, *ours[:i]], adapter)
        if int(logits.argmax()) != ours[i]:
            ties, wrong = (ties + 1, wrong) if is_tie(logits, ours[i]) else (ties, wrong + 1)
    return ties, wrong


def assert_identical(
    ours: Sequence[int], answer: Answer, oracle: PeftOracle, prompt: Sequence[int], adapter: str | None
) -> int:
    """Tokens equal the oracle's except at ties; from a tie on, the oracle follows our tokens. Returns the ties."""
    if list(ours) == answer.tokens:
        return 0
    first = next(i for i, (a, b) in enumerate(zip(ours, answer.tokens, strict=True)) if a != b)
    assert is_tie(answer.logits[first], ours[first]), (
        f"token {first}: {ours[first]} is not {answer.tokens[first]}, and no tie"
    )
    ties = 1
    for i in range(first + 1, len(ours)):
        logits = oracle.logits_after([*prompt, *ours[:i]], adapter)
        if int(logits.argmax()) != ours[i]:
            assert is_tie(logits, ours[i]), f"token {i} after a tie"
            ties += 1
    return ties


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def assert_close_logits(ours: Sequence[torch.Tensor], answer: Answer, num_tokens: int) -> None:
    """Logits of the first ``num_tokens`` draws agree within ``LOGITS`` of their scale."""
    expected = answer.logits[:num_tokens]
    error = (torch.stack(list(ours[:num_tokens])) - expected).abs().max()
    assert float(error) <= LOGITS * float(expected.abs().max()), f"logits differ by {float(error):.2e}"
