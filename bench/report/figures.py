"""Draw the figures of the report, with the same bytes for the same CSV files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.summary import BASELINE, TaskResults

Title = Callable[[str], str]

# "C0" to "C19", so that no two methods share a colour.
_COLORS = [matplotlib.colormaps["tab20"](k) for k in (*range(0, 20, 2), *range(1, 20, 2))]
_STYLE = {"axes.prop_cycle": cycler(color=_COLORS), "svg.fonttype": "none"}
_MARKERS = "os^vD<>ph*"


def draw_figures(task: TaskResults, paths: Mapping[str, Path], title: Title) -> None:
    """Draw the figures of a task; return them by kind."""
    draw = {"Accuracy": _accuracy, "Tuning": _tuning, "Sharpness and gap": _sharpness}
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": task.name}):
        for kind, path in paths.items():
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            draw[kind](figure.subplots(), task, title)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Date": None})


def _accuracy(axes: Axes, task: TaskResults, title: Title) -> None:
    """Draw mean accuracy with its 95 % interval, and every seed's accuracy."""
    from scipy import stats

    shown = [method for method in task.methods if task.values(method, "accuracy")]
    for row, method in enumerate(shown):
        estimate = task.estimate(method, "accuracy")
        assert estimate is not None
        values = [100 * value for value in task.values(method, "accuracy").values()]
        axes.plot(values, [row] * len(values), "|", color=f"C{row}", alpha=0.5)
        half = stats.t.ppf(0.975, max(1, estimate.count - 1)) * estimate.error
        axes.errorbar(
            100 * estimate.mean,
            row,
            xerr=100 * half,
            fmt="o",
            color=f"C{row}",
            capsize=3,
        )
    if (baseline := task.estimate(BASELINE, "accuracy")) is not None:
        axes.axvline(100 * baseline.mean, color="C0", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(shown)), [title(method) for method in shown])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %: mean with its 95 % interval, and each seed")
    axes.set_title(task.name)
    axes.grid(axis="x", alpha=0.3)


def _tuning(axes: Axes, task: TaskResults, title: Title) -> None:
    """Draw validation accuracy over the radius."""
    for k, method in enumerate(task.methods):
        if curve := task.tuning_curve(method, "rho"):
            rho, accuracy = zip(*curve, strict=True)
            mean = [100 * estimate.mean for estimate in accuracy]
            error = [100 * estimate.error for estimate in accuracy]
            axes.errorbar(
                rho,
                mean,
                yerr=error,
                fmt=f"{_MARKERS[k % len(_MARKERS)]}-",
                color=f"C{k}",
                capsize=2,
                label=title(method),
            )
    axes.set_xscale("log")
    axes.set_xlabel("rho, of each method's own meaning")
    axes.set_ylabel("validation accuracy, % ± one standard error")
    axes.set_title(task.name)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _sharpness(axes: Axes, task: TaskResults, title: Title) -> None:
    """Draw the gap over worst-case sharpness, one point for each run."""
    points = task.points("sharpness_worst", "gap")
    for k, method in enumerate(task.methods):
        own = [(x, y) for name, x, y in points if name == method]
        if own:
            axes.plot(
                *zip(*own, strict=True),
                _MARKERS[k % len(_MARKERS)],
                color=f"C{k}",
                alpha=0.7,
                label=title(method),
            )
    axes.set_xlabel("worst-case sharpness")
    axes.set_ylabel("test loss less training loss")
    axes.set_title(task.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
