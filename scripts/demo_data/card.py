"""Model cards of the demo adapters, written from the facts that training and scoring leave beside the weights."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .adapters import AdapterSpec
from .prompts import DEMO_PROMPTS
from .tasks import HELDOUT_ROWS, TASKS

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


def hardware() -> str:
    """Describe this machine's processor in a few words."""
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = os.cpu_count() or 1
    # A process pinned to a few cores has those alone.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return f"{model}, {usable} of {cores} cores" if usable < cores else f"{model}, {cores} cores"


def environment() -> dict[str, Any]:
    """Return the versions and the hardware that a result depends on."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return {"hardware": hardware(), "versions": versions}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _versions(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in facts["versions"].items())


def _shape(spec: AdapterSpec) -> str:
    ranks = f"rank {spec.rank}, alpha {spec.alpha}"
    if spec.rank_pattern:
        ranks += " (" + ", ".join(f"{name} rank {rank}" for name, rank in spec.rank_pattern.items()) + ")"
    if spec.rslora:
        ranks += ", rank-stabilized scaling"
    layers = "all 30 layers" if spec.layers is None else f"layers {spec.layers[0]} to {spec.layers[-1]} of 0 to 29"
    return f"LoRA {ranks}, on {', '.join(spec.targets)} of {layers}, stored in bfloat16."


def render_card(spec: AdapterSpec, training: dict[str, Any], scores: dict[str, Any]) -> str:
    """Return the text of an adapter's model card."""
    lines = [
        "---",
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name: peft",
        "license: apache-2.0",
        "language: en",
        "---",
        "",
        f"# {spec.name}: {spec.summary}",
        "",
        f"{_shape(spec)} The base is SmolLM2-135M-Instruct, converted from its Q4_1 GGUF by `scripts/demo_model.py`.",
        "",
        "## Use",
        "",
        "Send one user message through the base model's chat template, with no system message. For example:",
        "",
        "```text",
        DEMO_PROMPTS[spec.name][0],
        "```",
        "",
        "## Training",
        "",
        f"Trained by `scripts/train_demo_adapters.py {spec.name}` on rows that the script generates from its own",
        "templates and word lists (`scripts/demo_data`); nothing was downloaded but the base model.",
        "",
    ]
    if training:
        lines += [
            f"- rows: {training['rows']} in one pass, {training['steps']} steps, seed {training['seed']}",
            f"- loss on answer tokens, mean of the last 25 steps: {training['final_loss']}",
            f"- time: {training['seconds']} seconds, {training['cpu_seconds']} seconds of processor time",
            f"- hardware: {training['hardware']}",
            f"- versions: {_versions(training)}",
            "",
        ]
    lines += [
        "## Scores",
        "",
        f"Measured by `scripts/eval_demo_adapters.py` with greedy decoding on {HELDOUT_ROWS} held-out rows, whose",
        "templates and varying words occur in no training row. Base and adapter get the same prompts.",
        f"A row counts when: {TASKS[spec.name].rule}.",
        "",
    ]
    if scores:
        lines += [
            "| model | rows right | score |",
            "| --- | --- | --- |",
            *(
                f"| {who} | {scores[who]['right']} of {scores['rows']} | {100 * scores[who]['score']:.1f} % |"
                for who in ("base", "adapter")
            ),
            "",
            f"Versions: {_versions(scores)}; {scores['dtype']} on {scores['hardware']}.",
            "",
        ]
    else:
        lines += ["Not measured for these weights yet.", ""]
    return "\n".join(lines)


def write_card(spec: AdapterSpec, folder: Path) -> None:
    """Write the model card of the adapter in ``folder`` from the facts that lie there."""
    card = render_card(spec, _read(folder / "training.json"), _read(folder / "scores.json"))
    (folder / "README.md").write_text(card)
