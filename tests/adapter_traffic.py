"""Adapters that come, change and go while clients ask for them, and PEFT's answers beside what the clients got."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import UnknownModelError
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import PlainLauncher
from tests.oracle import Answer, PeftOracle, differences
from tests.tiny_models import make_model, random_adapter, target_modules

ROOT = Path(__file__).parents[1]
# Engine depth, adapters of which the host has room for a copy, options.
SETTINGS: list[tuple[int, int, dict[str, Any]]] = [
    # Two or three adapters on the host: most loads come from disk.
    (0, 2, {"max_loras": 3}),
    (1, 2, {"max_loras": 3}),
    # Nothing on the host, and adapters lose their slots while their requests run.
    (0, 0, {"max_loras": 1, "max_adapter_wait": 0.01, "policy": "fcfs"}),
    (1, 0, {"max_loras": 1, "max_adapter_wait": 0.01, "policy": "fcfs"}),
]
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
        self.seconds = 0.0
        self.done = asyncio.Event()
        self.answered = asyncio.Event()

    async def manage(self) -> None:
        start = time.perf_counter()
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
        self.seconds = time.perf_counter() - start
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
        try:
            service.generate("late", [5], SamplingParams(), "first0")
        except UnknownModelError:
            pass
        else:
            raise AssertionError("an adapter that was unloaded is still served")
        async for _ in service.generate("last", [5], SamplingParams(max_tokens=1), None):
            pass
        assert service.stats().resident_adapters == [] and service.stats().num_running == 0
    finally:
        await service.stop()
    return world


def run(folder: Path, depth: int, num_copies: int, options: dict[str, Any]) -> tuple[World, PeftOracle]:
    """One of ``SETTINGS`` on a small random model, whose files are written to ``folder``, and PEFT with all adapters.

    The worker must find this package: its folder belongs in PYTHONPATH.
    """
    model = make_model("llama", folder / "base")
    for number in range(NUM_CONTENTS):
        random_adapter(model, folder / f"a{number}", 2 + 3 * number, 8.0, target_modules("llama"), seed=number)
    size = (folder / "a5" / "adapter_model.safetensors").stat().st_size
    config = EngineConfig(
        str(folder / "base"),
        device="cpu",
        num_threads=1,
        num_blocks=64,
        max_model_len=64,
        adapter_host_memory=num_copies * size,
        depth=depth,
        **options,
    )
    world = asyncio.run(asyncio.wait_for(run_world(folder, depth, config), 250))
    return world, PeftOracle(model, {f"a{number}": folder / f"a{number}" for number in range(NUM_CONTENTS)})


def compare(world: World, oracle: PeftOracle) -> dict[str, int]:
    """The answers beside those of PEFT with the weights that each request was sent to."""
    expected: dict[tuple[int, int, int], Answer] = {}
    found = {"answers": len(world.answers), "tokens": 0, "ties": 0, "wrong_tokens": 0}
    for content_hash, prompt, tokens in world.answers:
        content = world.numbers[content_hash]
        name = None if content < 0 else f"a{content}"
        key = (content, prompt, len(tokens))
        if key not in expected:
            expected[key] = oracle.answer(PROMPTS[prompt], name, len(tokens))
        ties, wrong = differences(tokens, expected[key], oracle, PROMPTS[prompt], name)
        found["tokens"] += len(tokens)
        found["ties"] += ties
        found["wrong_tokens"] += wrong
    return found
