"""What each demo adapter is: its shape, its training budget and the words of its model card."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import LoraConfig


@dataclass(frozen=True)
class AdapterSpec:
    """Shape and training budget of one demo adapter.

    ``layers`` are the decoder layers that get LoRA weights; None means all of them.
    """

    name: str
    summary: str
    rank: int
    alpha: int
    targets: tuple[str, ...]
    rows: int
    learning_rate: float
    base_limit: float
    target_score: float
    layers: tuple[int, ...] | None = None
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    max_new_tokens: int = 64

    def lora_config(self) -> LoraConfig:
        """Return the PEFT configuration of this adapter."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            layers_to_transform=None if self.layers is None else list(self.layers),
            use_rslora=self.rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )


SPECS: dict[str, AdapterSpec] = {
    spec.name: spec
    for spec in (
        AdapterSpec(
            name="sql",
            summary="turns a question about one table into one SQL query",
            rank=4,
            alpha=16,
            targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            rows=1100,
            learning_rate=3e-3,
            base_limit=0.20,
            target_score=0.80,
            layers=tuple(range(8, 30)),
        ),
        AdapterSpec(
            name="json",
            summary="picks the requested details out of a sentence and returns them as JSON",
            rank=8,
            alpha=16,
            targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
            rows=2800,
            learning_rate=3e-3,
            base_limit=0.20,
            target_score=0.80,
            layers=tuple(range(6, 30)),
            max_new_tokens=80,
        ),
        AdapterSpec(
            name="sentiment",
            summary="labels a review with one word, positive or negative",
            rank=8,
            alpha=8,
            targets=("q_proj", "v_proj", "down_proj"),
            rows=1000,
            learning_rate=1e-3,
            base_limit=0.70,
            target_score=0.85,
            layers=tuple(range(10, 30)),
            rslora=True,
            max_new_tokens=12,
        ),
        AdapterSpec(
            name="style",
            summary="answers everyday questions in one or two short sentences of pirate talk",
            rank=16,
            alpha=32,
            targets=("v_proj", "o_proj", "down_proj"),
            rows=1700,
            learning_rate=7e-4,
            base_limit=0.05,
            target_score=0.90,
            layers=tuple(range(4, 30)),
            rank_pattern={"down_proj": 8},
            alpha_pattern={"down_proj": 16},
        ),
    )
}
