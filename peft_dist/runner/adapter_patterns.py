"""Which modules an adapter's configuration names, by PEFT's rules for names and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import regex

from peft_dist.core.errors import AdapterError

Value = TypeVar("Value")

ALL_LINEAR = "all-linear"
_PLAIN = re.compile(r"[\w.]+\Z")
# A plain expression takes a microsecond.
_SECONDS = 0.5
_ANY_LAYER_LIST = r".*?\.[^.]*"


class Pattern:
    """A regular expression of a configuration, matched within a time limit and without the interpreter's lock.

    Python's own engine holds the lock: an expression that backtracks for hours would stop every thread. The package
    ``regex`` matches the same language.

    Raises:
        AdapterError: ``text`` is no regular expression; from the methods: it took too long.
    """

    def __init__(self, text: str, field: str) -> None:
        self._text, self._field = text, field
        try:
            re.compile(text)
            self._compiled = regex.compile(text, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"adapter_config.json: {field} makes {text[:200]!r}, which is no valid regular expression ({error}): "
                "correct it"
            ) from error

    def match(self, path: str) -> regex.Match[str] | None:
        """At the start of a path."""
        return self._in_time(self._compiled.match, path)

    def fullmatch(self, path: str) -> regex.Match[str] | None:
        """Over the whole path."""
        return self._in_time(self._compiled.fullmatch, path)

    def _in_time(self, matcher: Callable[..., regex.Match[str] | None], path: str) -> regex.Match[str] | None:
        try:
            return matcher(path, concurrent=True, timeout=_SECONDS)
        except TimeoutError:
            raise AdapterError(
                f"adapter_config.json: {self._field} makes {self._text[:200]!r}, which takes more than {_SECONDS:g} s "
                f"on the name {path!r}: write it without nested repetitions, or list the modules"
            ) from None


class PatternMap(Generic[Value]):
    """``rank_pattern`` or ``alpha_pattern``: the first pattern, in file order, that matches a path's tail wins.

    A pattern matches when it covers the whole path or everything after one of its dots.
    """

    def __init__(self, patterns: dict[str, Value], field: str) -> None:
        self._rules = [
            (_last_name(text), Pattern(rf"(.*\.)?({text})$", field), value) for text, value in patterns.items()
        ]

    def get(self, path: str, default: Value) -> Value:
        last = path.rpartition(".")[2]
        for name, pattern, value in self._rules:
            if last.endswith(name) and pattern.match(path):
                return value
        return default


def _last_name(text: str) -> str:
    """What a matching path must end with, where that is plain to see: saves most of the regular expressions."""
    return text.rpartition(".")[2] if _PLAIN.match(text) else ""


class NameSet:
    """Module names given as a list (whole paths or their tails) or as one regular expression for whole paths."""

    def __init__(self, names: str | Iterable[str], field: str) -> None:
        self._pattern = Pattern(names, field) if isinstance(names, str) else None
        self._names = frozenset(() if isinstance(names, str) else names)
        self._tails = tuple(f".{name}" for name in self._names)

    def is_exact(self, path: str) -> bool:
        """Whether ``path`` itself is listed: such a module is named whatever its layer's number."""
        return path in self._names

    def __contains__(self, path: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fullmatch(path) is not None
        return path in self._names or path.endswith(self._tails)


class LayerRule:
    """``layers_to_transform`` and ``layers_pattern``: keeps modules whose layer number is listed."""

    def __init__(self, layers: Iterable[int], containers: Iterable[str]) -> None:
        self._layers = frozenset(layers)
        heads = [rf"(?:^|.*?\.){name}" for name in containers] or [_ANY_LAYER_LIST]
        self._patterns = [Pattern(rf"{head}\.(?P<idx>\d+)\.", "layers_pattern") for head in heads]

    def __contains__(self, path: str) -> bool:
        for pattern in self._patterns:
            if found := pattern.match(path):
                return int(found["idx"]) in self._layers
        return False


@dataclass(frozen=True, slots=True)
class TargetRule:
    """Which modules the configuration adapts.

    Attributes:
        targets: ``target_modules``; None when the configuration leaves the choice to the architecture.
        all_linear: ``target_modules`` is "all-linear": every linear layer but the output head.
        excluded: ``exclude_modules``.
        layers: ``layers_to_transform``; None is every layer.
    """

    targets: NameSet | None
    all_linear: bool
    excluded: NameSet
    layers: LayerRule | None

    def allows(self, path: str, kind: str) -> bool:
        """Whether a module may have tensors."""
        if path in self.excluded:
            return False
        if self.all_linear:
            return kind != "embedding"
        return self.targets is None or self._names(path)

    def requires(self, path: str, kind: str) -> bool:
        """Whether a module must have tensors; a top-level linear layer under "all-linear" may be the output head."""
        if self.targets is None and not self.all_linear:
            return False
        return self.allows(path, kind) and not (self.all_linear and "." not in path)

    def _names(self, path: str) -> bool:
        assert self.targets is not None
        if self.targets.is_exact(path):
            return True
        return path in self.targets and (self.layers is None or path in self.layers)
