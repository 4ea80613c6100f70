"""What a comparison leaves behind: progress bars, the table, the plot and the run folder."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eflat_ext.config import FinetuneConfig, Method
from eflat_ext.data import InputError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from eflat_ext.finetune import Result, Task
    from eflat_ext.loading import Model
    from eflat_ext.plan import Experiment, Run
    from eflat_ext.results import Row

TITLES: dict[Method, str] = {
    "lora": "LoRA",
    "eflat": "EFlat-LoRA",
    "flat": "Flat-LoRA",
    "lora-sam": "LoRA-SAM",
    "full": "full",
}


# --- on the screen -----------------------------------------------------------------------


def announce(config: FinetuneConfig, task: Task) -> None:
    """One paragraph on what is about to run."""
    from rich.console import Console

    splits = task.splits
    learnt = f"{len(splits.classes)} classes" if splits.classes else "to write the label"
    Console().print(
        f"{config.model} on {config.data}: {len(splits.train):,} training sentences, "
        f"{len(task.held_out):,} for {config.evaluate_on}, {learnt}; "
        f"{task.steps:,} steps of {config.batch_size} on {task.device}",
        highlight=False,
    )


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


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: mean and standard error over the seeds, seconds as a median.

    Args:
        results: ``Result.metrics`` of each run.
    """
    rows = []
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result for result in results if result["method"] == method]
        row: dict[str, Any] = {"method": method, "seeds": len(runs)}
        for name in ("accuracy", "loss", "train_loss"):
            values = [run[name] for run in runs]
            row[name] = statistics.fmean(values)
            if len(runs) > 1:
                row[f"{name}_standard_error"] = statistics.stdev(values) / math.sqrt(len(runs))
        row["seconds_per_step"] = statistics.median(run["seconds_per_step"] for run in runs)
        if "peak_memory_mib" in runs[0]:
            row["peak_memory_mib"] = max(run["peak_memory_mib"] for run in runs)
        rows.append(row)
    return rows


def make_table(rows: Sequence[dict[str, Any]], part: str) -> Table:
    """The rows of :func:`summarize` as a table; ``part`` is what the figures were taken on."""
    from rich.table import Table

    table = Table()
    table.add_column("method", no_wrap=True)
    memory = any("peak_memory_mib" in row for row in rows)
    for title in ("accuracy", f"{part} loss", "training loss", "s/step"):
        table.add_column(title, justify="right")
    if memory:
        table.add_column("peak MiB", justify="right")

    def figure(row: dict[str, Any], name: str, digits: int, scale: float = 1.0) -> str:
        text = f"{row[name] * scale:.{digits}f}"
        if (error := row.get(f"{name}_standard_error")) is not None:
            text += f" ± {error * scale:.{digits}f}"
        return text

    for row in rows:
        cells = [TITLES[row["method"]], figure(row, "accuracy", 2, 100) + " %"]
        cells += [figure(row, "loss", 4), figure(row, "train_loss", 4)]
        cells += [f"{row['seconds_per_step']:.3f}"]
        if memory:
            cells.append(f"{row['peak_memory_mib']:.0f}" if "peak_memory_mib" in row else "")
        table.add_row(*cells)
    return table


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


# --- the run folder ----------------------------------------------------------------------


def free_folder(wanted: Path | None) -> Path:
    """``wanted`` if it is new or empty, without creating it; else a name by date and time."""
    if wanted is None:
        stamp = datetime.now().strftime("%Y-%m-%d_%H%M%S")
        names = (f"{stamp}-{k}" if k else stamp for k in range(1000))
        return next(folder for name in names if not (folder := Path("runs", name)).exists())
    try:
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise InputError(f"--output-dir {wanted} exists already and is not an empty folder")
    except OSError as error:
        raise InputError(f"cannot use --output-dir {wanted}: {error.strerror or error}") from None
    return wanted


def create_folder(folder: Path, config: FinetuneConfig, task: Task) -> None:
    """Make the run folder and write config.yaml, which reproduces the run."""
    import yaml  # type: ignore[import-untyped]

    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    header = (
        "# Settings of this comparison; `eflat finetune --config FILE` runs it again.\n"
        f"# {packages}\n"
        f"# device {task.device}, {torch.get_num_threads()} CPU threads, {task.steps} steps\n"
    )
    body = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(header + body, encoding="utf-8")
    except InputError:
        with suppress(OSError):
            (folder / "config.yaml").unlink(missing_ok=True)
            for path in new:
                if path.exists():
                    path.rmdir()
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what goes wrong in writing to the run folder into an InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {folder}: {reason}") from None


def save_run(folder: Path, result: Result, model: Model, task: Task) -> None:
    """Write METHOD/seed-N: adapter or model, metrics.json and the loss of every step.

    The folder has its name only once it is whole, so a process that is killed leaves no other.
    """
    metrics = result.metrics
    whole = folder / metrics["method"] / f"seed-{metrics['seed']}"
    run = _unfinished(whole)
    model.save_pretrained(str(run))
    if metrics["method"] == "full":
        task.tokenizer.save_pretrained(run)
    _write_json(run / "metrics.json", metrics)
    with (run / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(enumerate(result.losses, start=1))
    run.rename(whole)


def finish(folder: Path, config: FinetuneConfig, results: Sequence[Result]) -> None:
    """Write results.json, results.csv and loss.png, and print the table."""
    from rich.console import Console

    runs = [result.metrics for result in results]
    summary = summarize(runs)
    _write_json(folder / "results.json", {"versions": versions(), "summary": summary, "runs": runs})
    table = folder / "results.csv"
    with _unfinished(table).open("w", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(name for run in runs for name in run)
        writer = csv.DictWriter(file, list(columns), restval="")
        writer.writeheader()
        writer.writerows(runs)
    _unfinished(table).rename(table)
    plot_losses(folder / "loss.png", results)
    console = Console()
    console.print(make_table(summary, config.evaluate_on))
    if skipped := sum(run.get("skipped_perturbations", 0) for run in runs):
        console.print(f"{skipped} perturbations were skipped (gradient zero or not finite)")
    console.print(f"run folder: {folder}{os.sep}", highlight=False, soft_wrap=True)


def plot_losses(path: Path, results: Sequence[Result]) -> None:
    """Draw each method's training loss over the steps: mean over seeds, raw and smoothed."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, method in enumerate(dict.fromkeys(result.metrics["method"] for result in results)):
        curves = [result.losses for result in results if result.metrics["method"] == method]
        loss = np.mean(curves, axis=0)
        window = np.ones(max(1, len(loss) // 20))
        # Dividing by the same sum over ones keeps the ends of the curve unbiased.
        smooth = np.convolve(loss, window, "same") / np.convolve(np.ones_like(loss), window, "same")
        steps = np.arange(1, len(loss) + 1)
        axes.plot(steps, loss, color=f"C{k}", alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth, color=f"C{k}", linewidth=2, label=TITLES[method])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss of the batch (nats)")
    if any(result.metrics["method"] == "eflat" for result in results):
        axes.set_title("EFlat-LoRA: the loss at its perturbed weights", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(_unfinished(path), dpi=150)
    _unfinished(path).rename(path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("eflat_ext", "torch", "transformers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _unfinished(path: Path) -> Path:
    """What a file or folder is called while it is written."""
    return path.with_name(f"unfinished-{path.name}")


def _write_json(path: Path, content: Any) -> None:
    def clean(value: Any) -> Any:
        # JSON knows no NaN and no infinity.
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return value

    text = json.dumps(clean(content), indent=2) + "\n"
    _unfinished(path).write_text(text, encoding="utf-8")
    _unfinished(path).rename(path)
