"""Builds the C kernels on first use and keeps them in the user's cache.

One shared library for each type of activations, plain C behind ctypes: it compiles in about two seconds and
is independent of torch's version. It runs on the thread pool that torch uses (the same OpenMP runtime).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-std=gnu11", "-Wno-psabi")
_COMPILE_SECONDS = 120

_libraries: dict[torch.dtype, ctypes.PyDLL | None] = {}
_lock = threading.Lock()


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded here."""


def library(dtype: torch.dtype) -> ctypes.PyDLL | None:
    """The kernels for activations of this type, built if need be; None (logged once) when that fails.

    Returns None also for types that have no C kernels.
    """
    if dtype not in _libraries:
        with _lock:
            if dtype not in _libraries:
                _libraries[dtype] = _load_or_warn(dtype)
    return _libraries[dtype]


def _load_or_warn(dtype: torch.dtype) -> ctypes.PyDLL | None:
    if dtype not in DTYPE_CODES:
        return None
    try:
        # PyDLL keeps the GIL: calls take microseconds, and getting it back can take a switch interval.
        return ctypes.PyDLL(str(build(dtype)))
    except (BuildError, OSError) as error:
        logger.warning("C kernels for %s are not available, torch runs instead (slower): %s", dtype, error)
        return None


def cache_dir() -> Path:
    """Where built kernels are kept: ``$PEFT_DIST_CACHE``, else ``$XDG_CACHE_HOME/peft_dist``, else ~/.cache."""
    if own := os.environ.get("PEFT_DIST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_dist"


def build(dtype: torch.dtype) -> Path:
    """Path of the library for this type, compiled unless the cache holds it.

    Processes may build at the same time: each writes a file of its own and renames it into place.

    Raises:
        BuildError: there is no compiler, it fails, or torch runs without OpenMP.
        OSError: the cache folder cannot be written.
    """
    compiler = _find_compiler()
    openmp = openmp_runtime()
    folder = cache_dir() / "kernels"
    target = folder / f"{str(dtype).removeprefix('torch.')}-{_key(compiler, openmp)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        _compile(compiler, openmp, DTYPE_CODES[dtype], Path(work)).replace(target)
    logger.info("built C kernels for %s: %s", dtype, target)
    return target


def _compile(compiler: str, openmp: str, dtype_code: int, work: Path) -> Path:
    objects = []
    for source in sorted(_SOURCES.glob("*.c")):
        objects.append(str(work / f"{source.stem}.o"))
        _run([compiler, *_FLAGS, f"-DPD_DTYPE={dtype_code}", "-c", str(source), "-o", objects[-1]])
    made = work / "kernels.so"
    # Without -fopenmp here: it would link the compiler's own runtime, and with it a second thread pool.
    _run([compiler, "-shared", *objects, openmp, "-lm", "-o", str(made)])
    return made


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _find_compiler() -> str:
    name = os.environ.get("PEFT_DIST_CC", "gcc")
    found = shutil.which(name)
    if not found:
        raise BuildError(f"no C compiler {name!r} on PATH: install gcc, or name one in PEFT_DIST_CC")
    return found


@functools.cache
def openmp_runtime() -> str:
    """File of the OpenMP runtime that torch's operators run on, whatever it is called and wherever it lies."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        symbol = ctypes.CDLL(str(torch_library)).GOMP_parallel
    except (OSError, AttributeError) as error:
        raise BuildError(f"torch's OpenMP runtime was not found: {error}") from error
    address = ctypes.cast(symbol, ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return file
    raise BuildError("torch's OpenMP runtime lies in no mapped file")


def _key(compiler: str, openmp: str) -> str:
    """Changes with everything that the machine code depends on."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + source.read_bytes())
    for part in (*_FLAGS, _run([compiler, "--version"]), openmp, platform.machine(), _cpu_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _cpu_features() -> str:
    """Model and feature flags of the first CPU: homes are shared between machines, machine code is not."""
    names = ("model name", "flags", "Features", "CPU part")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(names))
