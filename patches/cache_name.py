"""What transformers calls the cache among a model's arguments, and in its answer."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

CACHE = "cache" if Version(version("transformers")) >= Version("5.24.dev0") else "past_key_values"
