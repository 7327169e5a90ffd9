"""What a replica remembers of names, for an orchestrator that has forgotten them."""

from __future__ import annotations

from peft_dist.core.succession import NameAdapters, NamedAdapter


class NameTable:
    """The orchestrator's registry as it was last told. The replica itself knows adapters by content alone."""

    def __init__(self) -> None:
        self._by_name: dict[str, NamedAdapter] = {}
        self.version = 0

    def apply(self, command: NameAdapters) -> None:
        if command.is_whole:
            self._by_name.clear()
        for name in command.taken:
            self._by_name.pop(name, None)
        self._by_name.update((one.spec.name, one) for one in command.given)
        self.version = command.version

    def all(self) -> list[NamedAdapter]:
        """In the order in which the names were given."""
        return list(self._by_name.values())
