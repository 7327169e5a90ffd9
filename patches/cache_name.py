"""What transformers calls the cache among a model's arguments, and in its answer."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

_OLD, _NEW = "past_key_values", "cache"
CACHE = _NEW if Version(version("transformers")) >= Version("5.24.dev0") else _OLD
"""As the installed version has it."""
NAMES = frozenset({_OLD, CACHE})
"""By which it may come: a newer version still takes the old one."""
