"""Write the run folder of a comparison: settings, adapters, figures and a plot."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eflat_ext.lab.data.texts import InputError

from .config import FinetuneConfig
from .means import summarize
from .screen import TITLES
from .versions import versions

if TYPE_CHECKING:
    from .loading import Model
    from .task import Result, Task


def free_folder(wanted: Path | None) -> Path:
    """Return ``wanted``, or by default a name of date and time, without creating the folder.

    Raises:
        InputError: ``wanted`` exists and is not an empty folder.
    """
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
    """Raise an error of writing to the run folder as an :class:`InputError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write to {folder}: {reason}") from None


def save_run(folder: Path, result: Result, model: Model, task: Task) -> None:
    """Write METHOD/seed-N: adapter or model, tokenizer, metrics.json and the loss of every step.

    classes.json names the classes in the order of their numbers, which an adapter does not store;
    with a config.json, transformers would take the folder for a whole model. The folder gets its
    name when it is complete, so a killed process leaves no incomplete folder of that name.
    """
    metrics = result.metrics
    complete = folder / metrics["method"] / f"seed-{metrics['seed']}"
    run = _unfinished(complete)
    model.save_pretrained(str(run))
    task.tokenizer.save_pretrained(run)
    if task.splits.classes:
        _write_json(run / "classes.json", task.splits.classes)
    _write_json(run / "metrics.json", metrics)
    with (run / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        writer.writerows(enumerate(result.losses, start=1))
    run.rename(complete)


def finish(folder: Path, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Write results.json, results.csv and loss.png; return the rows of :func:`summarize`."""
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
    return summary


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


def _unfinished(path: Path) -> Path:
    """Return the name of a file or folder while it is being written."""
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

    text = json.dumps(clean(content), indent=2, ensure_ascii=False) + "\n"
    _unfinished(path).write_text(text, encoding="utf-8")
    _unfinished(path).rename(path)
