"""What a patch is, which library versions it was tested with, and how a changed original is noticed."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version


class UnsupportedVersionError(RuntimeError):
    """An installed library lies outside the range that a patch was tested with."""


class SourceNotFoundError(LookupError):
    """The code that a patch stands on is not where it was."""


@dataclass(frozen=True)
class Patch:
    """One place where this package changes what third-party code does.

    Attributes:
        target: What behaves differently, as ``module:qualified.name``.
        replacement: What takes its place, as ``module:qualified.name``.
        kind: "register", "class swap" (on an instance), "subclass", "instance attribute" or "replace".
        file: File of this package that applies it.
        library: Distribution that the target belongs to.
        versions: Versions that it was tested with.
        reason: Why it is needed.
        relies_on: Code whose source is fingerprinted: the original, and what the replacement takes for granted.
        fingerprints: Fingerprint of that source by a library version that has it.
    """

    target: str
    replacement: str
    kind: str
    file: str
    library: str
    versions: str
    reason: str
    relies_on: tuple[str, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def check_version(self, installed: str | None = None) -> None:
        """Raises UnsupportedVersionError when the installed library lies outside the tested range."""
        version = installed or importlib.metadata.version(self.library)
        if not SpecifierSet(self.versions).contains(Version(version).base_version):
            raise UnsupportedVersionError(
                f"{self.file} patches {self.target} and was tested with {self.library} {self.versions}; installed is "
                f"{version}. Install a version in that range, or run the tests in tests/patches with this one and "
                "widen the range in patches/catalog.py"
            )

    def fingerprint(self, root: Path | None = None) -> str:
        """Digest of the sources in ``relies_on``, of the installed library or of one unpacked below ``root``."""
        digest = hashlib.sha256()
        for name in self.relies_on:
            digest.update(source_of(name, root).encode())
        return digest.hexdigest()[:16]


def check_versions(patches: Iterable[Patch]) -> None:
    """Raises UnsupportedVersionError for the first patch whose library is outside its tested range."""
    for patch in patches:
        patch.check_version()


def source_of(name: str, root: Path | None = None) -> str:
    """Source text of ``module:qualified.name``; of all definitions when it has several (property and setter).

    Raises:
        SourceNotFoundError: there is no such module or definition.
    """
    module, _, qualified = name.partition(":")
    text = _module_path(module, root).read_text(encoding="utf-8")
    nodes: list[ast.AST] = [_parse(text)]
    for part in qualified.split("."):
        nodes = [
            child for node in nodes for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part
        ]
    if not nodes:
        raise SourceNotFoundError(
            f"{module} defines no {qualified}: the library changed; review the patch that names it"
        )
    lines = text.split("\n")
    return "\n".join(_segment(lines, node) for node in nodes)


@functools.lru_cache(maxsize=4)
def _parse(text: str) -> ast.Module:
    """Several patches look into the same large modules, one after the other."""
    return ast.parse(text)


def _segment(lines: list[str], node: Any) -> str:
    """A definition's text without its first line's indentation and its last line's end."""
    return "\n".join(lines[node.lineno - 1 : node.end_lineno])[node.col_offset :]


def _module_path(module: str, root: Path | None) -> Path:
    if root is not None:
        path = root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    # Imports the module's parents and not the module: the source is read, not run.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SourceNotFoundError(f"module {module} is not installed")
    return Path(spec.origin)
