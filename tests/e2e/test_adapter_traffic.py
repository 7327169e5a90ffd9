"""Adapters come, change and go under traffic: no request fails, and no token is of other weights than asked for."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import UnknownModelError
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import PlainLauncher
from tests.oracle import Answer, PeftOracle, assert_identical
from tests.tiny_models import make_model, random_adapter, target_modules

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
NUM_CONTENTS = 12
NUM_CALLS = 300
NUM_CLIENTS = 6
PROMPTS = [[5, 6, 7], list(range(10, 40)), [9] * 17]
LENGTHS = [2, 12, 24]


class World:
    """Clients and a manager of adapters around one service; remembers every answer with the weights it must be of."""

    def __init__(self, service: EngineService, folder: Path, seed: int) -> None:
        self.service = service
        self.folder = folder
        self.random = random.Random(seed)
        self.answers: list[tuple[str, int, list[int]]] = []
        self.errors: list[str] = []
        self.calls = {"load": 0, "replace": 0, "unload": 0}
        # Which adapter is which content, and what each name's own folder holds.
        self.numbers: dict[str, int] = {"": -1}
        self.contents: dict[Path, str] = {}
        self.waiting: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()
        self.overwritten = ""
        self.num_overwritten = 0
        self.done = asyncio.Event()
        self.answered = asyncio.Event()

    async def manage(self) -> None:
        for _ in range(NUM_CALLS):
            names = [spec.name for spec in self.service.adapters()]
            kind = self.random.choice(["load", "replace", "unload"])
            if not names or (kind == "load" and len(names) < 8):
                await self._load("load", f"n{self.random.randrange(10**6)}")
            elif kind == "unload" and len(names) > 3:
                await self.service.unload_adapter(self.random.choice(names))
                self.calls["unload"] += 1
            else:
                running = [name for name in names if self.begun[old := self._own(name)] and not self.waiting[old]]
                await self._load("replace", self.random.choice(running or names))
            # Calls come as fast as requests begin and end.
            self.answered.clear()
            await self.answered.wait()
        self.done.set()

    def _own(self, name: str) -> str:
        """Content of the name's own folder."""
        return self.contents.get(self.folder / f"own-{name}", "none")

    async def _load(self, kind: str, name: str) -> None:
        number = self.random.randrange(NUM_CONTENTS)
        source, own = self.folder / f"a{number}", self.folder / f"own-{name}"
        old = self._own(name)
        if self.waiting[old]:
            # Who has not begun needs the old files.
            spec = await self.service.load_adapter(name, str(source), replace=True)
        else:
            self.num_overwritten += self.begun[old] > 0
            self.overwritten = old
            shutil.copytree(source, own, dirs_exist_ok=True)
            spec = await self.service.load_adapter(name, str(own), replace=kind == "replace")
            self.contents[own] = spec.content_hash
            self.overwritten = ""
        self.numbers[spec.content_hash] = number
        self.calls[kind] += 1

    async def ask(self, client: int) -> None:
        chance = random.Random(client)
        number = 0
        while not self.done.is_set():
            names = [spec.name for spec in self.service.adapters() if spec.content_hash != self.overwritten]
            prompt = chance.randrange(len(PROMPTS))
            # Some adapters are asked for by several at once: as long as the eldest runs, the others have their slot.
            name = chance.choice(names[: chance.choice([2, 8])]) if names else None
            spec = self.service.resolve(name)
            content = "" if spec is None else spec.content_hash
            self.waiting[content] += 1
            greedy = SamplingParams(temperature=0.0, max_tokens=chance.choice(LENGTHS), ignore_eos=True)
            tokens: list[int] = []
            async for _, progress in self.service.generate(f"c{client}-{number}", PROMPTS[prompt], greedy, name):
                if progress.token_ids and not tokens:
                    self.waiting[content] -= 1
                    self.begun[content] += 1
                    self.answered.set()
                tokens += progress.token_ids
                if progress.error:
                    self.errors.append(progress.error)
            (self.begun if tokens else self.waiting)[content] -= 1
            self.answers.append((content, prompt, tokens))
            self.answered.set()
            number += 1


async def run_world(folder: Path, seed: int, config: EngineConfig) -> World:
    launcher = PlainLauncher(config, log_level="error")
    service = EngineService(launcher, OrchestratorOptions(max_num_seqs=16, max_queue=64, seed=1))
    try:
        await service.start()
        world = World(service, folder, seed)
        for number in range(4):
            spec = await service.load_adapter(f"first{number}", str(folder / f"a{number}"))
            world.numbers[spec.content_hash] = number
        await asyncio.gather(world.manage(), *(world.ask(client) for client in range(NUM_CLIENTS)))
        for name in [spec.name for spec in service.adapters()]:
            await service.unload_adapter(name)
        with pytest.raises(UnknownModelError):
            service.generate("late", [5], SamplingParams(), "first0")
        async for _ in service.generate("last", [5], SamplingParams(max_tokens=1), None):
            pass
        assert service.stats().resident_adapters == [] and service.stats().num_running == 0
    finally:
        await service.stop()
    return world


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "num_copies", "options"),
    [
        # Two or three adapters on the host: most loads come from disk.
        (0, 2, {"max_loras": 3}),
        (1, 2, {"max_loras": 3}),
        # Nothing on the host, and adapters lose their slots while their requests run.
        (0, 0, {"max_loras": 1, "max_adapter_wait": 0.01, "policy": "fcfs"}),
        (1, 0, {"max_loras": 1, "max_adapter_wait": 0.01, "policy": "fcfs"}),
    ],
)
def test_three_hundred_calls_under_traffic(
    depth: int,
    num_copies: int,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    model = make_model("llama", tmp_path / "base")
    for number in range(NUM_CONTENTS):
        random_adapter(model, tmp_path / f"a{number}", 2 + 3 * number, 8.0, target_modules("llama"), seed=number)
    names = {f"a{number}": tmp_path / f"a{number}" for number in range(NUM_CONTENTS)}
    size = (tmp_path / "a5" / "adapter_model.safetensors").stat().st_size
    config = EngineConfig(
        str(tmp_path / "base"),
        device="cpu",
        num_threads=1,
        num_blocks=64,
        max_model_len=64,
        adapter_host_memory=num_copies * size,
        depth=depth,
        **options,
    )
    world = asyncio.run(asyncio.wait_for(run_world(tmp_path, depth, config), 250))
    assert world.errors == [] and sum(world.calls.values()) == NUM_CALLS
    assert world.num_overwritten, "no files were overwritten while requests ran on them"
    oracle = PeftOracle(model, names)
    expected: dict[tuple[int, int, int], Answer] = {}
    ties = 0
    answers = [(world.numbers[key], prompt, tokens) for key, prompt, tokens in world.answers]
    for content, prompt, tokens in answers:
        name = None if content < 0 else f"a{content}"
        key = (content, prompt, len(tokens))
        if key not in expected:
            expected[key] = oracle.answer(PROMPTS[prompt], name, len(tokens))
        ties += assert_identical(tokens, expected[key], oracle, PROMPTS[prompt], name)
    assert len(answers) >= NUM_CALLS // 2 and len({content for content, _, _ in answers}) == NUM_CONTENTS
    with capsys.disabled():
        print(f"\n{world.calls}, {world.num_overwritten} over files in use, {len(answers)} answers, {ties} ties")
