"""Read and write CSV files of rows, one dictionary each, and measure the rows that are missing."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, all values as strings; no rows if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys atomically, floats to four digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    partial.replace(path)


def complete(
    path: Path,
    columns: Sequence[str],
    runs: Iterable[tuple[Any, ...]],
    rows_of: Callable[..., Iterable[dict[str, Any]]],
    again: bool = False,
) -> list[dict[str, Any]]:
    """Measure the runs that are missing in a file, and write it after each.

    Args:
        columns: Columns that identify a run.
        runs: Values of these columns.
        rows_of: Measures a run, given its values; returns its rows.
        again: Measure runs that the file holds, too.

    Returns:
        All rows of the file.
    """
    for run in runs:
        rows, values = read(path), [str(value) for value in run]
        others = [row for row in rows if [row[column] for column in columns] != values]
        if again or len(others) == len(rows):
            write(path, [*others, *rows_of(*run)])
    return read(path)
