"""Which adapters stay on the device whatever comes, and whether there is room for others beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError
from peft_dist.engine.adapter_space import AdapterSpace

_REMEDY = "unload or unpin one"


class AdapterPins:
    """Pins by name, so that one content under two names stays until neither is pinned.

    Every adapter that is registered fits beside all that are pinned: else its requests would wait for ever.
    """

    def __init__(self, space: AdapterSpace) -> None:
        self._space = space
        self._by_name: dict[str, AdapterSpec] = {}
        self._contents: Counter[str] = Counter()
        self._unmet: dict[str, AdapterSpec] = {}

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._contents

    @property
    def specs(self) -> list[tuple[str, AdapterSpec]]:
        """Each name with what it pins."""
        return list(self._by_name.items())

    @property
    def unmet(self) -> list[AdapterSpec]:
        """Pinned, and to be brought to the device; the longest pinned first."""
        return list(self._unmet.values())

    @property
    def has_unmet(self) -> bool:
        """Whether there are any."""
        return bool(self._unmet)

    def add(self, name: str, spec: AdapterSpec) -> None:
        """Have a name pin this content, and no other any more."""
        self.remove(name)
        self._by_name[name] = spec
        self._contents[spec.content_hash] += 1
        self._unmet[spec.content_hash] = spec

    def remove(self, name: str) -> None:
        """Nothing happens where the name pins nothing."""
        spec = self._by_name.pop(name, None)
        if spec is None:
            return
        self._contents[spec.content_hash] -= 1
        if not self._contents[spec.content_hash]:
            del self._contents[spec.content_hash]
            self._unmet.pop(spec.content_hash, None)

    def forget(self, content_hash: str) -> None:
        """Remove a content under all its names."""
        for name in [name for name, spec in self._by_name.items() if spec.content_hash == content_hash]:
            self.remove(name)

    def settle(self, content_hash: str) -> None:
        """The content is on the device, or could not be brought there: nobody need fetch it for its pin."""
        self._unmet.pop(content_hash, None)

    def check_beside(self, name: str, spec: AdapterSpec) -> None:
        """Raises AdapterError when there is no room for an adapter that is not pinned, called ``name``."""
        pinned = self._after(name)
        if spec.content_hash not in pinned and (problem := self._space.find_excess(spec, pinned.values())):
            raise AdapterError(f"adapter {name!r} {problem}: {_REMEDY}, or raise adapter_device_memory")

    def check_pin(self, name: str, spec: AdapterSpec, others: Iterable[AdapterSpec]) -> None:
        """Raises AdapterError when pinning it would leave no room for one of ``others``, or for no further one."""
        pinned = self._after(name) | {spec.content_hash: spec}
        if problem := self._space.find_full(pinned.values()):
            raise AdapterError(f"adapter {name!r} cannot be pinned: {problem}")
        least = self._space.find_least_room(pinned.values())
        for other in others:
            # The ranks of a thousand adapters are too many to compare one by one between two steps.
            if other.content_hash in pinned or least is None or self._space.pages_of(other.max_rank) <= least:
                continue
            if excess := self._space.find_excess(other, pinned.values()):
                raise AdapterError(
                    f"adapter {name!r} cannot be pinned: adapter {other.name!r} {excess}: {_REMEDY}, or raise "
                    "adapter_device_memory"
                )

    def check(self) -> None:
        """Raise AssertionError unless the counts are those of the names."""
        assert self._contents == Counter(spec.content_hash for spec in self._by_name.values()), "pins"
        assert self._unmet.keys() <= self._contents.keys(), "a load for no pin"

    def _after(self, name: str) -> dict[str, AdapterSpec]:
        """What stays pinned when this name pins nothing, by content."""
        return {spec.content_hash: spec for own, spec in self._by_name.items() if own != name}
