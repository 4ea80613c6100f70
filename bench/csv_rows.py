"""CSV files of rows, one dictionary each, for the instruments that keep what they measured."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, all words; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same names, numbers to four digits; all of them or nothing."""
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
    """Measure the runs that a file lacks, writing it after each.

    Args:
        columns: those that tell one run from another.
        runs: their values.
        rows_of: measures one, given these.
        again: measure those, too, that the file holds.

    Returns:
        The file's rows.
    """
    for run in runs:
        rows, values = read(path), [str(value) for value in run]
        others = [row for row in rows if [row[column] for column in columns] != values]
        if again or len(others) == len(rows):
            write(path, [*others, *rows_of(*run)])
    return read(path)
