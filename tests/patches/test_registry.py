"""Patches name the versions they were tested with, and notice when the code under them changes."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import peft_dist
from peft_dist.patches import UnsupportedVersionError, catalog, fingerprints
from peft_dist.patches.registry import Patch, SourceNotFoundError, source_of
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("patch", catalog.PATCHES, ids=lambda patch: patch.target)
def test_installed_source_is_the_one_that_was_patched(patch: Patch) -> None:
    installed = importlib.metadata.version(patch.library)
    assert patch.fingerprint() in patch.fingerprints.values(), (
        f"{patch.library} {installed} changed code that {patch.file} stands on ({', '.join(patch.relies_on)}): review "
        f"it, then add '{installed}': '{patch.fingerprint()}' in patches/catalog.py"
    )


@pytest.mark.parametrize("patch", catalog.PATCHES, ids=lambda patch: patch.target)
def test_entry_is_complete(patch: Patch) -> None:
    assert patch.reason.endswith(".") and patch.fingerprints and patch.relies_on
    module, _, name = patch.replacement.partition(":")
    assert hasattr(importlib.import_module(module), name)
    assert (Path(peft_dist.__file__).parent / patch.file).is_file()
    patch.check_version()
    for version in patch.fingerprints:
        patch.check_version(version)


# What gives a module another class, another place or other tensors.
CHANGES = re.compile(
    r"\.__class__ = |\.set_submodule\(|\.data = |__dict__\[\"forward\"\] = |\.weight = nn\.Parameter\("
)
SOURCES = [
    path for path in sorted(Path(peft_dist.patches.__file__).parent.glob("*.py")) if CHANGES.search(path.read_text())
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_what_changes_a_model_is_in_the_documentation(source: Path) -> None:
    """By its file, or by the class that it gives."""
    page = (Path(__file__).parents[2] / "docs" / "patches.md").read_text().partition("## What is patched")[2]
    table = page.partition("\n## ")[0]
    names = {source.name, source.stem, *re.findall(r"^class (\w+)", source.read_text(), re.MULTILINE)}
    assert any(f"`{name}`" in table or f"`{name}." in table for name in names), f"{source.name}: not in the table"


@pytest.mark.parametrize("version", ["4.57.0", "5.16.9", "5.25.0", "6.0.0"])
def test_untested_version_is_refused_by_file_and_range(version: str) -> None:
    with pytest.raises(UnsupportedVersionError, match=rf"patches/paged_cache.py.*>=5.17,<5.25.*{version}"):
        catalog.CACHE.check_version(version)


def test_development_and_release_candidate_count_as_their_version() -> None:
    catalog.LINEAR.check_version("0.21.3.dev0")
    with pytest.raises(UnsupportedVersionError):
        catalog.LINEAR.check_version("0.22.0rc1")


def test_refusal_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(FAMILIES["llama"](), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    constructor, classes = PeftModel.__init__, [type(m) for m in model.modules()]
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "peft" else real(name))
    for attempt in (lambda: peft_dist.patch(model), peft_dist.patch):
        with pytest.raises(UnsupportedVersionError, match=r"patches/lora_layers.py.*peft >=0.21,<0.22.*9\.9"):
            attempt()
    assert PeftModel.__init__ is constructor and [type(m) for m in model.modules()] == classes


def test_fingerprint_changes_with_any_source_it_covers(tmp_path: Path) -> None:
    package = tmp_path / "library"
    package.mkdir()
    (package / "__init__.py").write_text("")
    module = package / "code.py"
    module.write_text("class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 1\n")
    patch = Patch("library.code:A", "x", "replace", "x", "library", ">=1", "r", ("library.code:A.f",))
    first = patch.fingerprint(tmp_path)
    module.write_text(module.read_text().replace("def g(self):\n        return 1", "def g(self):\n        return 2"))
    assert patch.fingerprint(tmp_path) == first
    module.write_text(module.read_text().replace("return 1", "return 3"))
    assert patch.fingerprint(tmp_path) != first
    with pytest.raises(SourceNotFoundError, match=r"library.code defines no A.h"):
        source_of("library.code:A.h", tmp_path)


def test_properties_are_covered_with_their_setters(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "class A:\n    @property\n    def f(self): ...\n    @f.setter\n    def f(self, v): ...\n"
    )
    assert source_of("m:A.f", tmp_path).count("def f") == 2


def test_missing_module_is_named() -> None:
    with pytest.raises(SourceNotFoundError, match=r"peft\.no_such_module"):
        source_of("peft.no_such_module:A")


def test_fingerprints_are_printed_for_the_catalog(capsys: pytest.CaptureFixture[str]) -> None:
    fingerprints.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(catalog.PATCHES) and all(line.endswith("known") for line in printed)


def test_the_package_asks_for_what_its_patches_were_tested_with() -> None:
    """A newer library in a fresh environment would be refused by the first model that is patched."""
    settings = configparser.ConfigParser()
    settings.read(Path(peft_dist.__file__).parents[1] / "setup.cfg")
    asked = [Requirement(line) for line in settings["options"]["install_requires"].split("\n") if line]
    found = {one.name: one.specifier for one in asked}
    assert found["transformers"] == SpecifierSet(catalog.TRANSFORMERS) and found["peft"] == SpecifierSet(catalog.PEFT)


def test_only_a_peft_model_is_unpatched() -> None:
    """Its base looks like it, and nothing would be undone."""
    for other in (FAMILIES["llama"](), "x"):
        with pytest.raises(TypeError, match="the PeftModel that was patched"):
            peft_dist.unpatch(other)  # type: ignore[type-var]
