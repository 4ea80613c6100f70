"""Compute means and standard errors over the seeds, and format them for tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summarize(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per method: mean and standard error over the seeds, seconds as a median.

    Both are NaN for a figure that is not finite in some run; ``diverged`` counts the runs whose
    loss is not finite, if there are any.

    Args:
        results: ``Result.metrics`` of each run.
    """
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": len(runs)}
        if diverged := sum(not math.isfinite(run["loss"] + run["train_loss"]) for run in runs):
            row["diverged"] = diverged
        for name in ("accuracy", "loss", "train_loss"):
            values = [run[name] for run in runs]
            finite = all(map(math.isfinite, values))
            row[name] = statistics.fmean(values) if finite else math.nan
            if len(runs) > 1:
                deviation = statistics.stdev(values) if finite else math.nan
                row[f"{name}_standard_error"] = deviation / math.sqrt(len(runs))
        row["seconds_per_step"] = statistics.median(run["seconds_per_step"] for run in runs)
        if "peak_memory_mib" in runs[0]:
            row["peak_memory_mib"] = max(run["peak_memory_mib"] for run in runs)
        rows.append(row)
    return rows


def cell(row: Mapping[str, Any], name: str, digits: int, scale: float = 1.0) -> str:
    """Format a figure of a row of :func:`summarize`, times ``scale``, as mean ± standard error."""
    if not math.isfinite(row[name]):
        return "not finite"
    text = f"{scale * row[name]:.{digits}f}"
    if (error := row.get(f"{name}_standard_error")) is not None:
        text += f" ± {scale * error:.{digits}f}"
    return text
