"""Compute the means, tests and verdicts of the report from the CSV files of experiments.

A method is compared with the baseline by a paired t-test over seeds, since both train on the same
sentences in the same order from the same weights. The tests of all methods on one task and figure
are one family, corrected by Holm's method. Over several tasks every task counts once, since runs of
one task share their data.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from bench import csv_rows
from eflat_ext.lab.experiment.results import KEY, Row

BASELINE = "lora"
PUBLISHED = "eflat"
LEVEL = 0.05
TASKS = 3  # fewest tasks that are compared together
VERDICTS = ("wins", "ties", "loses")
# Neither small nor large values of these are better in themselves.
NEUTRAL = {"gap": ("smaller", "ties", "larger")}
NEUTRAL |= {f"sharpness_{kind}": NEUTRAL["gap"] for kind in ("worst", "random")}
LOST = "incomplete"


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and its standard error (NaN for one seed)."""

    mean: float
    error: float
    count: int


@dataclass(frozen=True)
class Comparison:
    """Mean paired difference of a method from the baseline, and its verdict.

    Attributes:
        difference: The method's figure minus the baseline's.
        low, high: 95 % confidence interval of this comparison alone.
        p: Two-sided p-value of the paired t-test, corrected by Holm's method.
        verdict: One of :func:`verdicts` at the level :data:`LEVEL`; :data:`LOST` if runs failed or
            have no finite value, since the others may be the easy ones.
    """

    difference: Estimate
    low: float
    high: float
    p: float
    verdict: str


@dataclass(frozen=True)
class Pooled:
    """Difference of a method from the baseline over several tasks of equal weight.

    Attributes:
        comparison: Comparison of the tasks' mean differences.
        runs: Number of pairs of runs.
        published: Mean of EFlat-LoRA, as published, over the same tasks; None if one is missing.
    """

    comparison: Comparison
    runs: int
    published: float | None


@dataclass(frozen=True)
class Choice:
    """Values that tuning chose, the number of candidates, and the values at the grid's edge."""

    tuned: dict[str, float]
    values: int
    at_edge: list[str]


class TaskResults:
    """All rows of one task of one experiment."""

    def __init__(self, experiment: str, task: str, rows: Sequence[Row]) -> None:
        self.experiment, self.name = experiment, task
        self._rows = rows
        self.methods = list(dict.fromkeys(row["method"] for row in rows))

    def runs(self, method: str, stage: str = "final", status: str = "ok") -> list[Row]:
        """Return the rows of a method's runs."""
        wanted = (method, stage, status)
        return [row for row in self._rows if (row["method"], row["stage"], row["status"]) == wanted]

    def is_tuned(self) -> bool:
        """Return True if methods were tuned for the task, so that they compare on equal terms."""
        return any(row["stage"] == "tuning" for row in self._rows)

    def failures(self) -> list[Row]:
        """Return the rows of the runs that failed."""
        return [row for row in self._rows if row["status"] != "ok"]

    def tests(self) -> list[str]:
        """Return the names of the additional test sets."""
        final = [row for row in self._rows if row["stage"] == "final"]
        names = {
            name: None for row in final for name, value in row.items() if value and "@" in name
        }
        return [n.removeprefix("accuracy@") for n in names if n.startswith("accuracy@")]

    def values(self, method: str, figure: str) -> dict[str, float]:
        """Return a figure of a method's final runs by seed; "gap" is test minus training loss."""
        return {s: v for s, v in self._values(method, figure).items() if math.isfinite(v)}

    def estimate(self, method: str, figure: str) -> Estimate | None:
        """Return mean and standard error of a figure over the seeds; None without a value."""
        values = list(self.values(method, figure).values())
        return _estimate(values) if values else None

    def ratio(self, method: str, figure: str) -> float | None:
        """Return the median over seeds of the ratio of a figure to the baseline's."""
        pairs = self._paired(method, figure)
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def comparisons(self, figure: str) -> dict[str, Comparison]:
        """Compare with the baseline every other method that has two or more seeds in common."""
        found = _compare({m: self.differences(m, figure) for m in self.methods}, figure)
        lost = {m for m in self.methods if self._lost(m, figure)}
        return {
            m: replace(c, verdict=LOST) if lost & {m, BASELINE} else c for m, c in found.items()
        }

    def differences(self, method: str, figure: str) -> list[float]:
        """Return a method's figure minus the baseline's, for each seed that both have."""
        return [a - b for a, b in self._paired(method, figure)]

    def choice(self, method: str) -> Choice | None:
        """Return the choice of a method's tuning; None before its first final run."""
        final = [row for row in self._rows if (row["method"], row["stage"]) == (method, "final")]
        if not final:
            return None
        tuned = json.loads(final[-1]["tuned"])
        tried = {r["tuned"] for r in self._rows if (r["method"], r["stage"]) == (method, "tuning")}
        grid = [json.loads(text) for text in tried]
        at_edge = []
        for name, value in tuned.items():
            values = [row[name] for row in grid]
            if not all(isinstance(one, (int, float)) for one in values):
                continue  # strings have no order
            if len(set(values)) > 1 and value in (min(values), max(values)):
                at_edge.append(name)
        return Choice(tuned, len(grid), at_edge)

    def tuning_curve(self, method: str, setting: str) -> list[tuple[float, Estimate]]:
        """Return the validation accuracy over a setting's values, of runs that did not fail."""
        by_value: dict[float, list[float]] = {}
        for row in self.runs(method, "tuning"):
            tuned = json.loads(row["tuned"])
            if setting in tuned:
                by_value.setdefault(tuned[setting], []).append(float(row["accuracy"]))
        return [(value, _estimate(by_value[value])) for value in sorted(by_value)]

    def correlation(
        self, x: str, y: str, without: str | None = None, within: bool = False
    ) -> tuple[float, float, float, int] | None:
        """Return Pearson's r of two figures over final runs, its 95 % interval, and their number.

        Args:
            without: Method whose runs are left out.
            within: Correlate the differences from each method's means (the partial correlation
                given the method).
        """
        points = [point for point in self.points(x, y) if point[0] != without]
        groups = [[p[1:] for p in points if p[0] == m] for m in dict.fromkeys(p[0] for p in points)]
        if not within:
            groups = [[pair for group in groups for pair in group]]
        # Fisher's transformation; each subtracted mean after the first costs a degree of freedom.
        freedom = len(points) - len(groups) - 2
        if freedom < 1:
            return None
        a, b = np.concatenate([np.array(group) - np.mean(group, 0) for group in groups]).T
        if np.allclose(a, 0, atol=1e-12) or np.allclose(b, 0, atol=1e-12):
            return None
        r = float(a @ b / math.sqrt((a @ a) * (b @ b)))
        half = stats.norm.ppf(0.975) / math.sqrt(freedom)
        middle = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r)))
        return r, math.tanh(middle - half), math.tanh(middle + half), len(points)

    def points(self, x: str, y: str) -> list[tuple[str, float, float]]:
        """Return method, x and y of every final run that has both."""
        points = []
        for method in self.methods:
            xs, ys = self.values(method, x), self.values(method, y)
            points += [(method, xs[seed], ys[seed]) for seed in xs if seed in ys]
        return points

    def _values(self, method: str, figure: str) -> dict[str, float]:
        if figure == "gap":
            loss, train = (self._values(method, name) for name in ("loss", "train_loss"))
            return {seed: loss[seed] - train[seed] for seed in loss if seed in train}
        return {row["seed"]: float(row[figure]) for row in self.runs(method) if row.get(figure)}

    def _lost(self, method: str, figure: str) -> bool:
        """Return True if a final run failed or has no finite value."""
        final = [r for r in self._rows if (r["method"], r["stage"]) == (method, "final")]
        finite = all(map(math.isfinite, self._values(method, figure).values()))
        return not finite or any(row["status"] != "ok" for row in final)

    def _paired(self, method: str, figure: str) -> list[tuple[float, float]]:
        own, baseline = self.values(method, figure), self.values(BASELINE, figure)
        return [(own[seed], baseline[seed]) for seed in own if seed in baseline]


def shared(task: TaskResults, others: Sequence[TaskResults]) -> dict[str, list[str]]:
    """Return, by the name of another task, the methods whose final runs both tasks share."""
    figures = ("method", "seed", "accuracy", "loss", "train_loss")

    def final(one: TaskResults, method: str) -> set[tuple[str, ...]]:
        return {tuple(row[name] for name in figures) for row in one.runs(method)}

    found = {}
    for other in others:
        methods = [m for m in task.methods if (own := final(task, m)) and own <= final(other, m)]
        if methods:
            found[other.name] = methods
    return found


def pooled(tasks: Sequence[TaskResults], figure: str) -> dict[str, Pooled]:
    """Compare the methods with the baseline over the tasks that have both, at least three."""
    differences: dict[str, dict[str, list[float]]] = {}
    lost = set()
    for task in tasks:
        lost |= {m for m, c in task.comparisons(figure).items() if c.verdict == LOST}
        for method in task.methods:
            if (found := task.differences(method, figure)) and method != BASELINE:
                differences.setdefault(method, {})[f"{task.experiment} {task.name}"] = found
    differences = {m: of_task for m, of_task in differences.items() if len(of_task) >= TASKS}
    means = {
        method: {task: statistics.fmean(found) for task, found in of_task.items()}
        for method, of_task in differences.items()
    }
    published = means.get(PUBLISHED, {})
    return {
        method: Pooled(
            replace(comparison, verdict=LOST) if method in lost else comparison,
            sum(map(len, differences[method].values())),
            statistics.fmean(published[task] for task in means[method])
            if means[method].keys() <= published.keys()
            else None,
        )
        for method, comparison in _compare(
            {method: list(of_task.values()) for method, of_task in means.items()}, figure
        ).items()
    }


def verdicts(figure: str) -> tuple[str, str, str]:
    """Return the words for a figure that is better (smaller), not different, worse (larger)."""
    return NEUTRAL.get(figure, VERDICTS)


def step_times(folder: Path) -> dict[str, dict[str, float]]:
    """Return by method a step's time over the baseline's and its memory, of bench.training.step."""
    path = folder / "step.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {one.pop("method"): one for one in found}


def load(folder: Path) -> list[TaskResults]:
    """Load the tasks of all experiments' CSV files of a folder; other CSV files are skipped.

    If a run was repeated, its last row counts.
    """
    tasks = []
    for path in sorted(folder.glob("*.csv")):
        found = csv_rows.read(path)
        if not found or not set(KEY) <= set(found[0]):
            continue
        rows = {tuple(row[name] for name in KEY): row for row in found}
        for task in dict.fromkeys(row["task"] for row in rows.values()):
            own = [row for row in rows.values() if row["task"] == task]
            tasks.append(TaskResults(path.stem, task, own))
    return tasks


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _compare(differences: dict[str, list[float]], figure: str) -> dict[str, Comparison]:
    """Compare differences from the baseline by method, as one family of tests."""
    larger_is_better = figure.startswith("accuracy")
    found = {m: d for m, d in differences.items() if m != BASELINE and len(d) > 1}
    p_values = holm([_p(values) for values in found.values()])
    comparisons = {}
    for (method, values), p in zip(found.items(), p_values, strict=True):
        estimate = _estimate(values)
        half = stats.t.ppf(0.975, estimate.count - 1) * estimate.error
        better, ties, worse = verdicts(figure)
        good = (estimate.mean > 0) == larger_is_better
        verdict = ties if p >= LEVEL else better if good else worse
        low, high = estimate.mean - half, estimate.mean + half
        comparisons[method] = Comparison(estimate, low, high, p, verdict)
    return comparisons


def _estimate(values: Iterable[float]) -> Estimate:
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


def _p(differences: Sequence[float]) -> float:
    if len(set(differences)) == 1:  # no variance, so no t: p of the sign test
        return 1.0 if differences[0] == 0 else 0.5 ** (len(differences) - 1)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
