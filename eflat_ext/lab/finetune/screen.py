"""Show a comparison on the terminal: its progress and the closing table."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import FinetuneConfig, Method
from .means import cell

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table

    from .task import Task

TITLES: dict[Method, str] = {
    "lora": "LoRA",
    "eflat": "EFlat-LoRA",
    "flat": "Flat-LoRA",
    "lora-sam": "LoRA-SAM",
    "full": "full",
}


def announce(config: FinetuneConfig, task: Task) -> None:
    """Print model, data, number of steps and device of a comparison that is about to run."""
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
    """Progress bars, one for each run, with its loss (a moving average) and steps per second."""

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
    """Return the progress bars of a comparison."""
    from rich.progress import TimeRemainingColumn

    figures = ("loss {task.fields[loss]:.3f}", "{task.fields[speed]:.1f} steps/s")
    return Bars(make_progress(*figures, TimeRemainingColumn()))


def make_progress(*columns: str | ProgressColumn) -> Progress:
    """Return progress bars on standard error: name, bar and count, then ``columns``.

    Args:
        columns: of Rich, or formats of ``task``.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *columns,
        console=Console(stderr=True),
    )


def make_table(rows: Sequence[dict[str, Any]], part: str) -> Table:
    """Return the rows of :func:`eflat_ext.lab.finetune.means.summarize` as a table.

    Args:
        rows: one for each method.
        part: name of the part of the data that the figures are of.
    """
    from rich.table import Table

    table = Table()
    table.add_column("method", no_wrap=True)
    memory = any("peak_memory_mib" in row for row in rows)
    for title in ("accuracy", f"{part} loss", "training loss", "s/step"):
        table.add_column(title, justify="right")
    if memory:
        table.add_column("peak MiB", justify="right")

    for row in rows:
        title = TITLES[row["method"]]
        if "diverged" in row:
            title += f" ({row['diverged']} of {row['seeds']} diverged)"
        cells = [title, cell(row, "accuracy", 2, 100) + " %"]
        cells += [cell(row, "loss", 4), cell(row, "train_loss", 4)]
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
    """Print the closing table and the path of the run folder.

    Args:
        folder: of the run.
        config: its settings.
        summary: see :func:`eflat_ext.lab.finetune.means.summarize`.
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
