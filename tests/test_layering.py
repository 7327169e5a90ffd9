"""The house rules, read from the source: who may import whom, sizes, cycles, and who touches third-party code."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_dist"

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "policy": {"core"},
    "engine": {"core", "policy"},
    "placement": {"core"},
    "orchestrator": {"core", "policy", "placement"},
    "workload": {"core"},
    "sim": {"core", "policy", "placement", "engine", "orchestrator", "workload"},
    "forward_context": set(),
    "kernels": set(),
    "patches": {"kernels", "forward_context"},
    "runner": {"core", "engine.executor", "patches", "kernels", "forward_context"},
    "worker": {"core", "engine", "runner"},
    "api": {"core", "orchestrator"},
    "cli_options": {"core"},
}
# The one place where the whole system meets in one process.
EXCEPTIONS = {
    "api/llm.py": {"engine", "runner"},
    "runner/replica.py": {"engine"},
    "runner/decision_log.py": {"engine.decisions"},
}
NO_TORCH = ("core", "policy", "placement", "engine", "orchestrator", "workload", "sim")


def sources() -> list[Path]:
    return sorted(
        p for p in [*PACKAGE.rglob("*.py"), *(ROOT / "patches").rglob("*.py")] if "peft_dist/patches" not in str(p)
    )


def name_of(path: Path) -> str:
    """Dotted name below the package."""
    base = PACKAGE if PACKAGE in path.parents else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Every module imported at run time, under TYPE_CHECKING excluded."""
    tree = ast.parse(path.read_text())
    hidden: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            hidden.update(id(child) for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{path}: relative import; write the package's full name")


def own(names: Iterator[str]) -> set[str]:
    return {name.removeprefix("peft_dist.") for name in names if name.startswith("peft_dist.")}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    layer = name_of(path).split(".")[0]
    if layer in (
        "",
        "cli",
        "cli_admin",
        "cli_announce",
        "cli_bench",
        "cli_checks",
        "cli_generate",
        "cli_help",
        "cli_adapters",
        "cli_serve",
        "cli_simulate",
        "cli_worker",
        "cli_workload",
        "__main__",
        "__init__",
    ):
        return
    allowed = ALLOWED[layer] | EXCEPTIONS.get(str(path.relative_to(PACKAGE)) if PACKAGE in path.parents else "", set())
    allowed = allowed | {layer}
    for name in own(imports(path)):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path} imports peft_dist.{name}"


@pytest.mark.parametrize("path", [p for p in sources() if name_of(p).split(".")[0] in NO_TORCH], ids=name_of)
def test_policy_layers_know_no_torch(path: Path) -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "numpy"}
    if name_of(path).split(".")[0] == "workload":
        heavy -= {"numpy"}  # Random numbers and percentiles by the hundred thousand.
    heavy &= {name.split(".")[0] for name in imports(path)}
    assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize(
    "module",
    [
        *("peft_dist", "peft_dist.engine.engine", "peft_dist.orchestrator.core", "peft_dist.placement.planner"),
        *("peft_dist.workload.client", "peft_dist.workload.generator", "peft_dist.worker.process"),
    ],
)
def test_a_fresh_interpreter_stays_free_of_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def targets(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that ``path`` needs; ``from package import module`` needs the module, not the package's names."""
    found = own(imports(path)) & modules.keys()
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_no_import_cycles() -> None:
    modules = {name_of(path): path for path in sources()}
    graph = {name: {m for m in targets(path, modules) if m != name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_sizes() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources() if path.name != "__init__.py"}
    assert statistics.median(lengths.values()) < 150
    assert not {str(path): n for path, n in lengths.items() if n > 350}


def test_only_patches_assigns_to_third_party_attributes() -> None:
    """Outside of patches/, no statement assigns to an attribute of an imported third-party name."""
    for path in sources():
        if name_of(path).startswith("patches"):
            continue
        tree = ast.parse(path.read_text())
        third_party: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                third_party |= {(a.asname or a.name).split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("peft_dist"):
                third_party |= {a.asname or a.name for a in node.names}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in third_party, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                first = node.args[0]
                assert not (isinstance(first, ast.Name) and first.id in third_party), f"{path}:{node.lineno}"


def test_packages_are_listed() -> None:
    listed = {
        line.strip() for line in (ROOT / "setup.cfg").read_text().splitlines() if line.startswith("    peft_dist")
    }
    found = {"peft_dist"} | {
        f"peft_dist.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py") if p.parent.name != "patches"
    }
    assert found | {"peft_dist.patches"} == {name for name in listed if "=" not in name}
