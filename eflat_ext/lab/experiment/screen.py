"""Show an experiment on the terminal: its progress, a table for each task, its failures.

The tables hold means over the final runs of each method.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from eflat_ext.lab.finetune.means import cell, summarize
from eflat_ext.lab.finetune.screen import make_progress

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from .plan import Experiment, Run
    from .results import Row


# --- progress ----------------------------------------------------------------------------


class ExperimentProgress:
    """Prints a line for each run that has ended, above a bar with the time left."""

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        self._total, self._progress = experiment.count(), progress
        self._begin = time.monotonic()
        self._left = self._done = 0
        self._bar = progress.add_task(experiment.name, total=self._total)

    def start(self, left: int) -> None:
        """Set the number of runs that are left."""
        self._left = left
        self._progress.update(self._bar, completed=self._total - left)

    def done(self, run: Run, row: Row) -> None:
        """Print the line of a run that has ended, and move the bar."""
        self._left, self._done = self._left - 1, self._done + 1
        seconds = self._left * (time.monotonic() - self._begin) / self._done
        outcome = row["error"] or f"{100 * float(row['accuracy']):.2f} %"
        tuned = ", ".join(f"{name} {value}" for name, value in run.tuned.items())
        self._progress.console.print(
            f"{self._total - self._left}/{self._total} {run.stage} {run.task.name} "
            f"{run.method.name} ({tuned}) seed {run.seed}: {outcome}; "
            f"{float(row['run_seconds']):.0f} s, {timedelta(seconds=round(seconds))} left",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        self._progress.update(self._bar, completed=self._total - self._left)


@contextlib.contextmanager
def experiment_progress(experiment: Experiment) -> Iterator[ExperimentProgress]:
    """Show the progress of an experiment on standard error within the block."""
    from rich.progress import TimeElapsedColumn

    with make_progress(TimeElapsedColumn()) as progress:
        yield ExperimentProgress(experiment, progress)


# --- the end -----------------------------------------------------------------------------


def print_tables(rows: Sequence[Row]) -> None:
    """Print a table for each task in an experiment's rows."""
    from rich.console import Console

    for task in dict.fromkeys(row["task"] for row in rows):
        Console().print(make_table(task, [row for row in rows if row["task"] == task]))


def make_table(task: str, rows: Sequence[Row]) -> Table:
    """Return a table of the chosen settings, mean accuracy and test loss, and failed runs.

    Args:
        task: name of the task.
        rows: of the task's runs.
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
        table.add_row(*(Text(text) for text in (method, *cells)))
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
    return [
        chosen,
        str(len(ended)),
        cell(means, "accuracy", 2, 100),
        cell(means, "loss", 4),
        failed,
    ]


def print_failures(experiment: Experiment, rows: Sequence[Row], untuned: Sequence[str]) -> None:
    """Print the runs that failed, the methods that could not be tuned, and the CSV file's path."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        if row["status"] != "ok":
            run = f"{row['stage']} {row['task']} {row['method']} {row['tuned']} seed {row['seed']}"
            console.print(f"failed: {run}: {row['error']}")
    for sentence in untuned:
        console.print(f"not run: {sentence}")
    console.print(f"{len(rows)} of {experiment.count()} runs: {experiment.results}")
