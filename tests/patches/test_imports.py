"""``peft_dist.patches`` imports from a bare checkout, an editable install and a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = (
    "import peft_dist, peft_dist.patches, importlib.util as u;"
    "assert peft_dist.patch is peft_dist.patches.patch;"
    "print(peft_dist.patches.__file__)"
)


def python(*arguments: str, cwd: Path, path: str = "") -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would check out, so that builds leave nothing in this one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("peft_dist", "patches", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-a", str(ROOT / name), str(folder / name)], check=True)
    return folder


def install(checkout: Path, target: Path, *options: str) -> None:
    common = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    python("-m", "pip", "install", *common, "--target", str(target), *options, cwd=checkout)


@pytest.mark.slow
def test_bare_checkout(checkout: Path, tmp_path: Path) -> None:
    assert python("-c", PROBE, cwd=tmp_path, path=str(checkout)) == str(checkout / "peft_dist/patches/__init__.py")
    assert (ROOT / "peft_dist" / "patches").is_symlink()
    assert (ROOT / "peft_dist" / "patches").readlink() == Path("../patches")


@pytest.mark.slow
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    install(checkout, tmp_path / "site", "--editable", ".")
    # The environment that runs the tests may hold an editable install of its own, which must not answer here.
    probe = (
        "import site, sys;"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in str(f)];"
        "[sys.modules.pop(name) for name in list(sys.modules) if 'editable' in name];"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r});"
        f"site.addsitedir({str(tmp_path / 'site')!r});{PROBE}"
    )
    assert Path(python("-c", probe, cwd=tmp_path)) == checkout / "peft_dist/patches/__init__.py"


def test_wheel(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path), ".", cwd=checkout)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert tops == {"peft_dist", next(top for top in tops if top.endswith(".dist-info"))}
        archive.extractall(tmp_path / "site")
    assert {p.name for p in (ROOT / "patches").glob("*.py")} == {
        p.name for p in (tmp_path / "site/peft_dist/patches").glob("*.py")
    }
    found = Path(python("-c", PROBE, cwd=tmp_path, path=str(tmp_path / "site")))
    assert found == tmp_path / "site/peft_dist/patches/__init__.py"
