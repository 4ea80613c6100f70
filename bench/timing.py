"""Shared parts of the benchmarks: interleaved timing, tables, JSON files and plots.

Ratios are taken within one run. The contenders take turns, in a new random order in each round, so
that other load on the machine affects all of them; the median over the rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int = 7, at_least: float = 0.02
) -> dict[str, float]:
    """Return the median seconds per call of each contender.

    Args:
        contenders: Functions to time, by name.
        rounds: Number of measurements of each.
        at_least: Seconds of one measurement; fast contenders are repeated within it.
    """
    repeats = {}
    for name, function in contenders.items():
        function()  # warm-up: allocations, thread pools
        begin = time.perf_counter()
        function()
        repeats[name] = max(1, round(at_least / (time.perf_counter() - begin)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in random.sample(list(contenders), len(contenders)):
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                contenders[name]()
            seconds[name].append((time.perf_counter() - begin) / repeats[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def copy_of(total_bytes: int) -> Callable[[], object]:
    """Return a copy that reads half of ``total_bytes`` and writes the other half."""
    source = torch.ones(total_bytes // 8, dtype=torch.float32)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def matrix_product(size: int = 1024) -> tuple[Callable[[], object], float]:
    """Return a float64 matrix product, the practical peak of multiply-adds, and their number."""
    x, y = (torch.randn(size, size, dtype=torch.float64) for _ in range(2))
    return lambda: x @ y, float(size) ** 3


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line for line in cpu_info.read_text().splitlines() if "model name" in line]
        model = names[0].split(":")[1].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column left-aligned, the others right-aligned."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * width for width in widths])
    for first, *others in table:
        cells = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def arguments(description: str, plot: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them")
    return parser


def write_json(path: Path | None, results: object) -> None:
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


def new_plot(**options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained", **options)
