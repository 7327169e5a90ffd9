"""Which adapters users can name, and which content the replicas still hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from peft_dist.core.adapter import BASE_NAMES, AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import AdapterError, AdapterNameError, PeftDistError, UnknownModelError
from peft_dist.core.messages import LoadAdapter
from peft_dist.core.succession import NameAdapters, NamedAdapter

_MAX_LISTED = 20


@dataclass(slots=True)
class _Load:
    """A load that the replicas in ``waiting`` have not answered yet. ``lost``: why one will never answer."""

    command: LoadAdapter
    waiting: set[int]
    specs: list[AdapterSpec] = field(default_factory=list)
    error: PeftDistError | None = None
    lost: PeftDistError | None = None


class AdapterRegistry:
    """Names are what new requests can use; content lives on as long as a name or a running request needs it."""

    def __init__(self) -> None:
        self._by_name: dict[str, AdapterSpec] = {}
        self._sources: dict[str, LoadAdapter] = {}
        self._pinned: set[str] = set()
        self._repins: dict[str, None] = {}
        self._uses: Counter[str] = Counter()
        # Of contents that lost a name while requests used them: what that was, and where it came from.
        self._left: dict[str, tuple[AdapterSpec, LoadAdapter]] = {}
        self._base_names: tuple[str, ...] = tuple(name for name in BASE_NAMES if name)
        self._loads: dict[int, _Load] = {}
        # Counts changes, over all lives of the orchestrator.
        self.version = 0
        self._renamed: dict[str, None] = {}
        self._is_restored_only = True
        # Whether a content may have been released that no name means; until somebody looks.
        self.has_unneeded = False

    def set_base(self, model: ModelInfo) -> None:
        names = (model.served_model_name, model.model, *(name for name in BASE_NAMES if name))
        self._base_names = tuple(dict.fromkeys(names))

    def specs(self) -> list[AdapterSpec]:
        return list(self._by_name.values())

    @property
    def pinned(self) -> frozenset[str]:
        """Names of the adapters that stay on the device."""
        return frozenset(self._pinned)

    def resolve(self, name: str | None) -> AdapterSpec | None:
        """The adapter ``name`` means, None for the base; "base:adapter" means the adapter.

        Raises:
            UnknownModelError: there is no such base or adapter.
        """
        if name is None or name in self._base_names:
            return None
        if name in self._by_name:
            return self._by_name[name]
        for base in self._base_names:
            adapter = name.removeprefix(f"{base}:")
            if adapter != name and adapter in self._by_name:
                return self._by_name[adapter]
        raise UnknownModelError(f"The model {name!r} does not exist. {self._served()}")

    def check_new_name(self, name: str, *, replace: bool) -> None:
        """Raises AdapterNameError when an adapter cannot be loaded under this name now."""
        if not name or name != name.strip():
            raise AdapterNameError(f"adapter name {name!r} is empty or padded: give a name without surrounding spaces")
        if name in self._base_names or any(name.startswith(f"{base}:") for base in self._base_names):
            raise AdapterNameError(f"adapter name {name!r} belongs to the base model: choose another name")
        if any(load.command.name == name for load in self._loads.values()):
            raise AdapterNameError(f"adapter {name!r} is being loaded already: wait for that to end")
        if name in self._by_name and not replace:
            raise AdapterNameError(
                f"adapter {name!r} is loaded already: unload it, or load it with replace=True (HTTP: load_inplace)"
            )

    def begin_load(self, command: LoadAdapter, replica_ids: set[int]) -> None:
        """A load was sent to these replicas."""
        self._loads[command.call_id] = _Load(command, replica_ids)

    @property
    def is_loading(self) -> bool:
        return bool(self._loads)

    def loads_on(self, replica_id: int) -> list[int]:
        """Loads that this replica has not answered yet."""
        return [call_id for call_id, load in self._loads.items() if replica_id in load.waiting]

    def cancel_loads(self) -> list[int]:
        """Forget all loads under way, and return their call ids."""
        calls = list(self._loads)
        self._loads.clear()
        return calls

    def settle(
        self, call_id: int, replica_id: int, answer: AdapterSpec | PeftDistError, *, lost: bool = False
    ) -> AdapterSpec | PeftDistError | None:
        """One replica's answer to a load: the outcome when it was the last one awaited, None before.

        The adapter gets its name only when every replica holds it that is still there; ``lost`` ones are not, and
        ``answer`` says why.
        """
        load = self._loads[call_id]
        name = load.command.name
        load.waiting.discard(replica_id)
        if isinstance(answer, AdapterSpec):
            load.specs.append(answer)
        elif lost:
            load.lost = answer
        else:
            load.error = answer
        if load.waiting:
            return None
        del self._loads[call_id]
        if load.command.pinned or name in self._pinned:
            # The load may have failed on another replica, or the name been unloaded after this one had obeyed.
            self._repins[name] = None
        contents = {spec.content_hash for spec in load.specs}
        if load.error is not None:
            return load.error
        if not contents:
            return load.lost or AdapterError(f"adapter {name!r}: the replica neither loaded nor refused it")
        if len(contents) > 1:
            return AdapterError(
                f"adapter {name!r} is not the same on all replicas (contents {', '.join(sorted(contents))}): "
                "load it again when its files no longer change"
            )
        self._leave(name)
        self._by_name[name], self._sources[name] = load.specs[-1], load.command
        self._rename(name)
        (self._pinned.add if load.command.pinned else self._pinned.discard)(name)
        return load.specs[-1]

    def reload_command(self, name: str, call_id: int) -> LoadAdapter:
        """What brings a named adapter to one more replica."""
        return msgspec.structs.replace(self._sources[name], call_id=call_id, pinned=name in self._pinned)

    def bring_command(self, spec: AdapterSpec, call_id: int) -> LoadAdapter:
        """What brings one of ``wanted`` to one more replica."""
        named = self._by_name.get(spec.name)
        if named is not None and named.content_hash == spec.content_hash:
            return self.reload_command(spec.name, call_id)
        return msgspec.structs.replace(self._left[spec.content_hash][1], call_id=call_id, pinned=False)

    def is_named_from(self, name: str, path: str, *, pinned: bool, **source: Any) -> bool:
        """Whether a name has what such a load would bring, unless the files there have changed since."""
        if name not in self._by_name:
            return False
        return self.reload_command(name, 0) == LoadAdapter(call_id=0, name=name, path=path, pinned=pinned, **source)

    def named(self, names: Iterable[str] | None = None) -> list[NamedAdapter]:
        """Some of the names, or all, with what they mean, for replicas to remember."""
        found = [name for name in (self._by_name if names is None else names) if name in self._by_name]
        return [_named(self._by_name[name], self.reload_command(name, 0)) for name in found]

    def restore(self, names: Iterable[NamedAdapter], version: int) -> bool:
        """Take what a replica remembers of an earlier life for the registry, if it is later; returns whether it is.

        Every replica is told every change in its order, so the highest version is all that was. Once a name was given
        or taken in this life, no earlier one counts any more.
        """
        if version <= self.version or not self._is_restored_only:
            return False
        for name in self._by_name:
            self._leave(name)
        self._by_name = {one.spec.name: one.spec for one in names}
        self._sources = {one.spec.name: _source(one) for one in names}
        self._repins.update(dict.fromkeys(self._pinned))
        self._pinned = {one.spec.name for one in names if one.pinned}
        self._repins.update(dict.fromkeys(self._pinned))
        self.version = version
        return True

    def take_renamed(self) -> NameAdapters | None:
        """What names mean that changed since the last call, for replicas that were told all before; None: nothing."""
        if not self._renamed:
            return None
        names, self._renamed = self._renamed, {}
        taken = [name for name in names if name not in self._by_name]
        return NameAdapters(version=self.version, given=self.named(names), taken=taken)

    def _rename(self, name: str) -> None:
        self._renamed[name] = None
        self.version += 1
        self._is_restored_only = False

    def repin(self, name: str) -> None:
        """A replica was told to pin this name at a time when it may have meant something else."""
        self._repins[name] = None

    def repin_if_pinned(self, names: Iterable[str]) -> None:
        """As ``repin``, for those of the names that are pinned."""
        for name in self._pinned.intersection(names):
            self.repin(name)

    def remove(self, name: str) -> None:
        """Raises UnknownModelError when no adapter has this name."""
        if not isinstance(name, str) or name not in self._by_name:
            raise UnknownModelError(f"The adapter {name!r} is not loaded. {self._served()}")
        self._leave(name)
        del self._by_name[name], self._sources[name]
        self._rename(name)
        if name in self._pinned:
            self._pinned.remove(name)
            self._repins[name] = None

    def _leave(self, name: str) -> None:
        """A name is about to mean nothing, or something else."""
        spec = self._by_name.get(name)
        if spec is not None and self._uses[spec.content_hash]:
            self._left[spec.content_hash] = spec, self._sources[name]

    def acquire(self, spec: AdapterSpec | None) -> None:
        if spec is not None:
            self._uses[spec.content_hash] += 1

    def release(self, spec: AdapterSpec | None) -> None:
        if spec is not None:
            self._uses[spec.content_hash] -= 1
            if not self._uses[spec.content_hash]:
                del self._uses[spec.content_hash]
                self._left.pop(spec.content_hash, None)
                named = self._by_name.get(spec.name)
                if named is None or named.content_hash != spec.content_hash:
                    self.has_unneeded = True

    def take_repins(self) -> list[tuple[str, str | None]]:
        """Names with the content that they pin from now on, None for nothing; each change is returned once."""
        names, self._repins = self._repins, {}
        return [(name, self._by_name[name].content_hash if name in self._pinned else None) for name in names]

    def needed(self) -> set[str]:
        """Content hashes that a name or an unfinished request needs."""
        return {spec.content_hash for spec in self._by_name.values()} | self._uses.keys()

    def wanted(self) -> list[AdapterSpec]:
        """What a replica that comes is brought: all that has a name, and what unfinished requests use that has none."""
        return [*self.specs(), *(spec for content, (spec, _) in self._left.items() if not self.is_named(content))]

    def is_named(self, content_hash: str) -> bool:
        """Whether a name means this content."""
        return any(spec.content_hash == content_hash for spec in self._by_name.values())

    def name_of(self, content_hash: str) -> str | None:
        """The first name of a content; None where it has none."""
        return next((spec.name for spec in self._by_name.values() if spec.content_hash == content_hash), None)

    def _served(self) -> str:
        names = list(self._by_name)
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        adapters = ", ".join(map(repr, names[:_MAX_LISTED])) + more if names else "none"
        return f"Served here: base {self._base_names[0]!r}; adapters: {adapters}."


def _named(spec: AdapterSpec, source: LoadAdapter) -> NamedAdapter:
    return NamedAdapter(spec, source.path, source.root, source.allow_hub, source.allow_pickle, source.pinned)


def _source(one: NamedAdapter) -> LoadAdapter:
    return LoadAdapter(
        call_id=0,
        name=one.spec.name,
        path=one.path,
        root=one.root,
        allow_hub=one.allow_hub,
        allow_pickle=one.allow_pickle,
        pinned=one.pinned,
    )
