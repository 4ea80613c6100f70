"""The tables that an experiment ends with: means over the final runs of each task and method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eflat_ext.run_folder import summarize

if TYPE_CHECKING:
    from rich.table import Table

    from eflat_ext.results import Row


def print_tables(rows: Sequence[Row]) -> None:
    """Print a table for each task that an experiment's rows are of."""
    from rich.console import Console

    for task in dict.fromkeys(row["task"] for row in rows):
        Console().print(make_table(task, [row for row in rows if row["task"] == task]))


def make_table(task: str, rows: Sequence[Row]) -> Table:
    """What was chosen, accuracy and test loss as mean ± standard error, and how many runs failed.

    Args:
        task: its name.
        rows: of its runs.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(task), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    table.add_column("chosen")
    for title in ("runs", "accuracy, %", "test loss", "failed"):
        table.add_column(title, justify="right", no_wrap=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = _cells([row for row in rows if row["method"] == method])
        table.add_row(*(Text(cell) for cell in (method, *cells)))
    return table


def _cells(rows: Sequence[Row]) -> list[str]:
    final = [row for row in rows if row["stage"] == "final"]
    ended = [row for row in final if row["status"] == "ok"]
    failed = str(sum(row["status"] != "ok" for row in rows))
    tuned = json.loads(final[-1]["tuned"]) if final else {}
    chosen = ", ".join(f"{name} {value}" for name, value in tuned.items())
    if not ended:
        return [chosen, "0", "", "", failed]
    names = ("accuracy", "loss", "train_loss", "seconds_per_step")
    runs = [{"method": "", **{name: float(row[name]) for name in names}} for row in ended]
    (means,) = summarize(runs)
    figures = [_figure(means, "accuracy", 2, 100), _figure(means, "loss", 4, 1)]
    return [chosen, str(len(ended)), *figures, failed]


def _figure(means: dict[str, Any], name: str, digits: int, scale: int) -> str:
    text = f"{scale * means[name]:.{digits}f}"
    if (error := means.get(f"{name}_standard_error")) is not None:
        text += f" ± {scale * error:.{digits}f}"
    return text
