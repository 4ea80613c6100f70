"""What a comparison and an experiment show: progress, the closing table, what failed."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eflat_ext.config import FinetuneConfig, Method

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from eflat_ext.finetune import Task
    from eflat_ext.plan import Experiment, Run
    from eflat_ext.results import Row

TITLES: dict[Method, str] = {
    "lora": "LoRA",
    "eflat": "EFlat-LoRA",
    "flat": "Flat-LoRA",
    "lora-sam": "LoRA-SAM",
    "full": "full",
}


# --- a comparison ------------------------------------------------------------------------


def announce(config: FinetuneConfig, task: Task) -> None:
    """One paragraph on what is about to run."""
    from rich.console import Console

    splits = task.splits
    learnt = f"{len(splits.classes)} classes" if splits.classes else "to write the label"
    console = Console(highlight=False, markup=False)
    console.print(
        f"{config.model} on {config.data}: {len(splits.train):,} training sentences, "
        f"{len(task.held_out):,} for {config.evaluate_on}, {learnt}; "
        f"{task.steps:,} steps of {config.batch_size} on {task.device}"
    )
    if str(splits.left_out):
        console.print(str(splits.left_out))


class Bars:
    """A progress bar for each run, with its loss (a moving average) and steps per second."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.live.is_started:  # else it would print an empty line
            self._progress.stop()

    def start(self, title: str, steps: int) -> Callable[[float], None]:
        """Add a bar; the function returned moves it by one step, given the step's loss."""
        self._progress.start()
        bar = self._progress.add_task(title, total=steps, loss=math.nan, speed=0.0)
        smooth = math.nan
        task = next(task for task in self._progress.tasks if task.id == bar)

        def on_step(loss: float) -> None:
            nonlocal smooth
            smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
            speed = (task.completed + 1) / max(task.elapsed or 0.0, 1e-9)
            self._progress.update(bar, advance=1, loss=smooth, speed=speed)

        return on_step


def progress() -> Bars:
    """Progress bars on standard error."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Bars(
        Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.1f} steps/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
    )


def make_table(rows: Sequence[dict[str, Any]], part: str) -> Table:
    """The rows of :func:`eflat_ext.run_folder.summarize` as a table.

    ``part`` is what the figures were taken on.
    """
    from rich.table import Table

    table = Table()
    table.add_column("method", no_wrap=True)
    memory = any("peak_memory_mib" in row for row in rows)
    for title in ("accuracy", f"{part} loss", "training loss", "s/step"):
        table.add_column(title, justify="right")
    if memory:
        table.add_column("peak MiB", justify="right")

    def figure(row: dict[str, Any], name: str, digits: int, scale: float = 1.0) -> str:
        if not math.isfinite(row[name]):
            return "not finite"
        text = f"{row[name] * scale:.{digits}f}"
        if (error := row.get(f"{name}_standard_error")) is not None:
            text += f" ± {error * scale:.{digits}f}"
        return text

    for row in rows:
        title = TITLES[row["method"]]
        if "diverged" in row:
            title += f" ({row['diverged']} of {row['seeds']} diverged)"
        cells = [title, figure(row, "accuracy", 2, 100) + " %"]
        cells += [figure(row, "loss", 4), figure(row, "train_loss", 4)]
        cells += [f"{row['seconds_per_step']:.3f}"]
        if memory:
            cells.append(f"{row['peak_memory_mib']:.0f}" if "peak_memory_mib" in row else "")
        table.add_row(*cells)
    return table


def show_results(
    folder: Path,
    config: FinetuneConfig,
    summary: Sequence[dict[str, Any]],
    runs: Sequence[dict[str, Any]],
) -> None:
    """The closing table, and where the results are.

    Args:
        folder: of the run.
        config: its settings.
        summary: see :func:`eflat_ext.run_folder.summarize`.
        runs: ``Result.metrics`` of each.
    """
    from rich.console import Console

    console = Console()
    console.print(make_table(summary, config.evaluate_on))
    if any(row["seeds"] > 1 for row in summary):
        console.print("±: standard error over the seeds")
    if skipped := sum(run.get("skipped_perturbations", 0) for run in runs):
        console.print(f"{skipped} perturbations were skipped (gradient zero or not finite)")
    console.print(f"run folder: {folder}{os.sep}", highlight=False, markup=False, soft_wrap=True)


# --- an experiment -----------------------------------------------------------------------


class ExperimentProgress:
    """A line for each run that has ended, and a bar with the time left under them."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._begin = time.monotonic()
        self._left = self._done = 0
        self._bar = progress.add_task("", total=total)

    def start(self, left: int) -> None:
        """So many of the experiment's runs are left."""
        self._left = left
        self._progress.update(self._bar, completed=self._total - left)

    def done(self, run: Run, row: Row) -> None:
        """A run has ended."""
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
    """Progress of an experiment on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(bar_width=40), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield ExperimentProgress(experiment.count(), progress)


def print_failures(experiment: Experiment, rows: Sequence[Row], untuned: Sequence[str]) -> None:
    """The runs that failed, the methods that could not be tuned, and where the rows are."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        if row["status"] != "ok":
            run = f"{row['stage']} {row['task']} {row['method']} {row['tuned']} seed {row['seed']}"
            console.print(f"failed: {run}: {row['error']}")
    for sentence in untuned:
        console.print(f"not run: {sentence}")
    console.print(f"{len(rows)} of {experiment.count()} runs: {experiment.results}")
