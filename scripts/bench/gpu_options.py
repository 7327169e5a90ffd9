"""Command-line options that the GPU benchmarks have in common, so that slices of one run can be made in turn."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.gpu_workload import ADAPTERS, BATCHES, KINDS, RANK, REQUESTS, SHAPES, Lengths, lengths


def make_parser(doc: str | None, parts: tuple[str, ...]) -> argparse.ArgumentParser:
    """``--part``, ``--batches``, ``--kinds`` and what says how large everything is."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts[:2]))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="which adapters requests ask for (default: all)")
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--rank", default=str(RANK), help="a number, or mix")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--new-tokens", type=int, help="tokens of the longer of the two timed runs")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peft-dist-bench",
                        help="where the adapters are written, and found again")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script on a CPU")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; ``--tiny`` overrides what makes a run large."""
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.requests = "tiny", min(options.requests, 24)
        options.batches = [batch for batch in options.batches if batch <= 8]
        options.adapters, options.new_tokens = min(options.adapters, 8), options.new_tokens or 9
    return options


def sizes_of(options: argparse.Namespace) -> Lengths:
    """The throughput run's lengths; shortened with ``--tiny``."""
    sizes = lengths(options.requests)
    return [(min(p, 64), min(n, 12)) for p, n in sizes] if options.tiny else sizes


def kinds_of(options: argparse.Namespace, usual: tuple[str, ...]) -> list[str]:
    """Those asked for, of the ones that a mode has; "eight" (PEFT's comparison) only if it is asked for."""
    return [kind for kind in options.kinds or usual if kind in usual and (options.kinds or kind != "eight")]
