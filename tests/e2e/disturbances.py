"""What goes on beside faults: running requests are moved, and adapters come, are used and leave."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

from peft_dist import SamplingParams
from peft_dist.core.errors import EngineDeadError
from peft_dist.orchestrator.service import EngineService


class Disturbances:
    """Moves forced at random tokens, and adapters loaded, asked and unloaded one after another.

    Attributes:
        moves, loads: How many there were.
    """

    def __init__(self, spare: Path, prompt: list[int], expected: list[int], chance: float = 0.05) -> None:
        """
        Args:
            spare: Adapter that is loaded under ever new names.
            prompt, expected: What it answers greedily.
            chance: That a request moves when tokens of it come.
        """
        self._spare = spare
        self._prompt = prompt
        self._expected = expected
        self._chance = chance
        self._random = random.Random(0)
        self._names = itertools.count()
        self.moves = 0
        self.loads = 0

    def tokens_came(self, service: EngineService, request_id: str) -> None:
        """Perhaps move the request, with its KV or without."""
        ready = list(service.replica_pids())
        if len(ready) > 1 and self._random.random() < self._chance:
            with_kv = self._random.choice((True, True, False))
            service.move_request(request_id, self._random.choice(ready), with_kv=with_kv)
            self.moves += 1

    async def change_adapters(self, service: EngineService, until: asyncio.Event) -> None:
        """Load one, ask it, unload it, until then."""
        params = SamplingParams(max_tokens=len(self._expected), temperature=0.0, ignore_eos=True)
        while not until.is_set():
            name = f"spare{next(self._names)}"
            try:
                await service.load_adapter(name, str(self._spare))
            except EngineDeadError:
                # On a busy machine one is lost before the other is back: whoever loads is told so, and tries again.
                assert not service.is_healthy, "a replica could have loaded it"
                while not service.is_healthy:
                    await asyncio.sleep(0.01)
                continue
            found: list[int] = []
            async for _, progress in service.generate(f"{name}.0", self._prompt, params, name):
                assert progress.error is None
                found += progress.token_ids
            assert found == self._expected
            await service.unload_adapter(name)
            self.loads += 1
