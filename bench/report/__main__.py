"""Write bench/REPORT.md, its figures and the tables of README.md from the files of bench/results.

python -m bench.report bench/results            write them
python -m bench.report bench/results --check    fail if one differs from the files
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cyclopts

from bench import csv_rows
from bench.experiments import batch_rise, estimate_quality, landscapes
from bench.report.figures import draw_figures
from bench.report.readme_tables import README, renewed
from bench.report.summary import (
    BASELINE,
    LEVEL,
    LOST,
    PUBLISHED,
    Comparison,
    TaskResults,
    load,
    pooled,
    shared,
    step_times,
    verdicts,
)
from bench.report.tables import (
    COMPARED,
    STEP,
    compared_cells,
    percent,
    plain,
    step_rows,
    table,
    title,
)
from eflat_ext.lab.experiment.results import Row

RESULTS = Path(__file__).resolve().parents[1] / "results"

HEAD = """# Does it generalise better, is it flatter, and what does it cost?

Written by `python -m bench.report bench/results` from the CSV files there; do not edit. The
experiments are in bench/experiments/, and `python -m bench.experiment FILE --jobs 2` runs one.

Figures are means over seeds ± one standard error. One seed means the same training sentences,
batches, first weights and number of steps for all methods, so methods are compared with {baseline}
seed by seed: mean difference, its 95 % interval by itself, and p of a paired t-test with Holm's
correction over the methods of a table, not over tables. A method *wins* or *loses* where
p < {level:g}, else it *ties*: no difference was shown, which is not that there is none. Where runs
failed, the comparison is *incomplete*. Settings were chosen on a validation part with other seeds:
the learning rate for {baseline} and full fine-tuning, each other method's radius at the rate chosen
for {baseline}. The gap is test less training loss, small also where little was learnt. Sharpness is
the rise of the loss on some training examples in the full space of the adapted layers, or of those
that the experiment's file names, one step along the gradient and under random noise. Memory is the
median ratio to {baseline} of the whole process's.
"""

POOLED = """\
All tasks with tuning together, each counting once, with the mean of EFlat-LoRA as published over
the same tasks; methods that ran on three tasks or more. Even tasks are not independent: those on
movie reviews share training and test sentences.
"""

STEPS = """\
A training step's time over {baseline}'s on the main job's batches, all methods in turn, and the
peak of a process's memory, from `python -m bench.training.step`.
"""

ESTIMATES = """\
Against the true gradient of every adapted layer's whole weight, means over layers, for one seed of
each model, of `python -m bench.experiments.estimate_quality`. Term A is computed from B's gradient
(it lies in the rows of A), term B from A's; *mean* averages the two as equation (1) does, tangent
has both with what they share counted once; onto B and onto A are what equation (3) leaves of the
mean, with its size over the radius asked for. Top share is the part of the true gradient's square
in its first singular direction.
"""

RISES = """\
How much higher a batch's loss is at LoRA-SAM's radius along other gradients, as a share of the rise
along its own, and in brackets the cosine of the two; plain LoRA, from
`python -m bench.experiments.batch_rise`.
Another batch and the sum of four are taken at the same weights; the last step's gradient and the
moving average are what one gradient a step has at hand; remembered is the sum of what the batch's
own examples left in the epoch before.
"""

LANDSCAPES = "figures/landscapes.svg"
SLICES = """\
The rise of the training loss of movies-256 along random directions in the full space of the adapted
layers, every row as long as the weight's: mean and range over three directions, for one seed of
each method, from `python -m bench.experiments.landscapes`. Full fine-tuning moves other layers,
too, but is shown in these.
"""


def report(
    tasks: Sequence[TaskResults],
    estimates: Sequence[Row] = (),
    rises: Sequence[Row] = (),
    times: Mapping[str, Mapping[str, float]] | None = None,
    slices: bool = False,
) -> str:
    """Return the report as Markdown.

    Args:
        tasks: From :func:`summary.load`.
        times: From :func:`summary.step_times`.
        estimates, rises: Rows of the files of estimate_quality.py and batch_rise.py.
        slices: True if there is a figure of landscapes.py.
    """
    if not tasks:
        raise SystemExit("there is no CSV file of an experiment")
    parts = [HEAD.format(baseline=title(BASELINE), level=LEVEL), *_overview(tasks)]
    parts += _correlations(tasks)
    for task in tasks:
        parts += [f"## {task.name} ({task.experiment})", _sentences(task), _shared(task, tasks)]
        parts += [_accuracy_table(task, "accuracy", "test accuracy"), _loss_table(task)]
        parts += [_accuracy_table(task, f"accuracy@{d}", f"accuracy on {d}") for d in task.tests()]
        parts += [
            _cost_table(task),
            _correlation(task),
            _tuned_table(task),
            _failures(task),
        ]
        parts += [f"![{kind} of {task.name}]({path})" for kind, path in figure_paths(task).items()]
    if times:
        steps = STEPS.format(baseline=title(BASELINE))
        parts += ["## The time of a step", steps, table(STEP, step_rows(times))]
    parts += _section(
        "The estimate of the full-space gradient", ESTIMATES, estimate_quality, estimates
    )
    parts += _section("What other gradients know of a batch", RISES, batch_rise, rises)
    if slices:
        parts += ["## Slices of the loss", SLICES, f"![Slices of the loss]({LANDSCAPES})"]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def figure_paths(task: TaskResults) -> dict[str, str]:
    """Return the paths of a task's figures relative to the report, by kind."""
    name = f"figures/{task.experiment}-{task.name}"
    paths = {"Accuracy": f"{name}-accuracy.svg"}
    if any(task.tuning_curve(method, "rho") for method in task.methods):
        paths["Tuning"] = f"{name}-tuning.svg"
    if task.points("sharpness_worst", "gap"):
        paths["Sharpness and gap"] = f"{name}-sharpness.svg"
    return paths


# --- text --------------------------------------------------------------------------------


KINDS = {
    "accuracy": "Accuracy",
    "loss": "Test loss",
    "gap": "Gap",
    "sharpness_worst": "Worst-case sharpness",
}


def _overview(tasks: Sequence[TaskResults]) -> list[str]:
    """Return each method's verdicts over all tuned tasks and test sets, and the tasks' means."""
    tasks = [task for task in tasks if task.is_tuned()]
    counts: dict[str, dict[str, Counter[str]]] = {}
    for task in tasks:
        for figure in _compared(task):
            for method, comparison in task.comparisons(figure).items():
                by_kind = counts.setdefault(method, {kind: Counter() for kind in KINDS})
                by_kind[figure.split("@")[0]][comparison.verdict] += 1
    rows = [
        [title(m), *(" / ".join(str(by_kind[k][v]) for v in verdicts(k)) for k in KINDS)]
        for m, by_kind in counts.items()
    ]
    if not rows:
        return []
    over = f"Verdicts on each method against {title(BASELINE)}, over "
    over += f"{_number(len(tasks), 'task')} with tuning and all their test sets; incomplete ones "
    over += "are left out:"
    head = [f"{name}: {' / '.join(verdicts(kind))}" for kind, name in KINDS.items()]
    parts = ["## Overview", over, table(["", *head], rows)]
    means = [part for figure in ("accuracy", "loss") for part in _pooled(tasks, figure)]
    return [*parts, POOLED, *means] if means else parts


def _pooled(tasks: Sequence[TaskResults], figure: str) -> list[str]:
    """Return the table of all tasks' mean differences in a figure."""
    scale, digits, unit = (100, 2, ", points") if figure == "accuracy" else (1, 4, "")
    rows = []
    for method, found in pooled(tasks, figure).items():
        published = "" if found.published is None else f"{scale * found.published:+.{digits}f}"
        counts = [str(found.comparison.difference.count), str(found.runs)]
        cells = compared_cells(found.comparison, scale, digits)
        rows.append([title(method), *counts, *cells, published])
    head = ["", "tasks", "runs", *COMPARED, f"{title(PUBLISHED)}'s on these tasks"]
    return [f"{KINDS[figure]} less {title(BASELINE)}'s{unit}:", table(head, rows)] if rows else []


def _correlations(tasks: Sequence[TaskResults]) -> list[str]:
    """Return the correlations of sharpness with the gap over runs with an adapter, by task."""
    rows = []
    for task in tasks:
        found = [
            task.correlation(f"sharpness_{kind}", "gap", "full", within)
            for kind in ("worst", "random")
            for within in (False, True)
        ]
        if any(found):
            cells = [f"{c[0]:.2f} ({c[1]:.2f} to {c[2]:.2f})" if c else "" for c in found]
            rows.append([task.name, str(next(c[3] for c in found if c)), *cells])
    words = "Correlation of sharpness with the gap over the final runs of adapters, and its 95 % "
    words += "interval as if runs were independent; within methods, of the differences from each "
    words += "method's means:"
    head = ["", "runs", "worst case", "within methods", "random noise", "within methods"]
    return [words, table(head, rows)] if rows else []


def _compared(task: TaskResults) -> list[str]:
    """Return the figures that methods are compared by."""
    also = [f"{figure}@{data}" for data in task.tests() for figure in ("accuracy", "loss")]
    return ["accuracy", "loss", *also, "gap", "sharpness_worst"]


def _sentences(task: TaskResults) -> str:
    """Return a sentence that names the methods that win, tie and lose."""
    counts = [len(task.runs(method)) for method in task.methods]
    low, high = min(counts), max(counts)
    finished = str(low) if low == high else f"{low} to {high}"
    lines = [f"Finished final runs of each method: {finished}.", ""]
    for figure in _compared(task):
        kind, _, data = figure.partition("@")
        if comparisons := task.comparisons(figure):
            words = [*verdicts(kind), *({LOST} & {c.verdict for c in comparisons.values()})]
            groups = [_group(comparisons, word, kind) for word in words]
            where = f" on {data}" if data else ""
            against = f"{KINDS[kind]}{where} against {title(BASELINE)}"
            lines.append(f"* {against} — {'; '.join(groups)}.")
    return "\n".join(lines)


def _shared(task: TaskResults, tasks: Sequence[TaskResults]) -> str:
    """Return a sentence on runs that are counted in another section, too."""
    return "\n".join(
        f"* The runs of {', '.join(map(title, methods))} are among those of {name}: some of its "
        "seeds, and no further evidence."
        for name, methods in shared(task, [t for t in tasks if t is not task]).items()
    )


def _group(comparisons: dict[str, Comparison], verdict: str, kind: str) -> str:
    names = [
        f"{title(method)} ({_signed(comparison, kind)})"
        for method, comparison in comparisons.items()
        if comparison.verdict == verdict
    ]
    return f"{verdict}: {', '.join(names) or 'none'}"


def _correlation(task: TaskResults) -> str:
    lines = []
    for figure, name in (("sharpness_worst", "worst-case"), ("sharpness_random", "random-noise")):
        for without, which in ((None, "all"), ("full", "all adapters'")):
            found = task.correlation(figure, "gap", without)
            if found is not None and (without is None or without in task.methods):
                r, low, high, count = found
                lines.append(
                    f"* Correlation of {name} sharpness with the gap over {which} {count} final "
                    f"runs: r = {r:.2f}, 95 % interval {low:.2f} to {high:.2f}."
                )
    return "\n".join(lines)


def _failures(task: TaskResults) -> str:
    lines = [
        f"* {row['stage']}, {title(row['method'])}, {_settings(json.loads(row['tuned']))}, "
        f"seed {row['seed']}: {row['error']}"
        for row in task.failures()
    ]
    return "\n".join([f"{_number(len(lines), 'run')} failed:", "", *lines]) if lines else ""


def _section(heading: str, words: str, instrument: Any, rows: Sequence[Row]) -> list[str]:
    """Return the tables of a module of bench/experiments; nothing without rows."""
    if not rows:
        return []
    parts = [f"## {heading}", words]
    for name, head, lines in instrument.tables([dict(row) for row in rows]):
        parts += [f"{name[0].upper()}{name[1:]}:", table(head, lines)]
    return parts


# --- tables ------------------------------------------------------------------------------


def _accuracy_table(task: TaskResults, figure: str, name: str) -> str:
    comparisons = task.comparisons(figure)
    rows = []
    for method in task.methods:
        compared = compared_cells(comparisons.get(method), 100, 2)
        rows.append([title(method), percent(task.estimate(method, figure)), *compared])
    return table(["", f"{name}, %", *COMPARED], rows)


def _loss_table(task: TaskResults) -> str:
    comparisons = task.comparisons("loss")
    rows = []
    for method in task.methods:
        loss, train, gap = (task.estimate(method, f) for f in ("loss", "train_loss", "gap"))
        compared = compared_cells(comparisons.get(method), 1, 4)
        rows.append([title(method), plain(loss), *compared, plain(train), plain(gap)])
    return table(["", "test loss", *COMPARED, "training loss", "gap"], rows)


def _cost_table(task: TaskResults) -> str:
    rows = []
    for method in task.methods:
        sharp = [task.estimate(method, f"sharpness_{kind}") for kind in ("worst", "random")]
        memory = task.ratio(method, "peak_memory_mib")
        parameters = task.estimate(method, "trainable_parameters")
        rows.append(
            [
                title(method),
                *map(plain, sharp),
                "" if memory is None else f"{memory:.2f}",
                "" if parameters is None else f"{parameters.mean:,.0f}",
            ]
        )
    head = ["", "worst-case sharpness", "random-noise sharpness"]
    return table([*head, "relative memory", "trained numbers"], rows)


def _tuned_table(task: TaskResults) -> str:
    rows = []
    for method in task.methods:
        choice = task.choice(method)
        runs = [len(task.runs(method, stage)) for stage in ("tuning", "final")]
        failed = sum(row["method"] == method for row in task.failures())
        chosen, values, edge = "none", "", ""
        if choice is not None:
            chosen, values = _settings(choice.tuned), str(choice.values)
            edge = ", ".join(choice.at_edge)
        rows.append([title(method), chosen, values, edge, *map(str, runs), str(failed)])
    head = ["", "chosen on validation", "of values", "at the edge of the grid"]
    return table([*head, "tuning runs", "final runs", "failed"], rows)


def _signed(comparison: Comparison, kind: str) -> str:
    if kind == "accuracy":
        return f"{100 * comparison.difference.mean:+.2f} points"
    return f"{comparison.difference.mean:+.4f}"


def _settings(tuned: dict[str, Any]) -> str:
    shown = [f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in tuned.items()]
    return ", ".join(shown) or "nothing to tune"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def main(results: Path, *, output: Path | None = None, check: bool = False) -> None:
    """Write the report, or check it; for bench/results the tables of README.md, too.

    Args:
        results: Folder of CSV files.
        output: The report; by default REPORT.md next to the folder, and README.md.
        check: Write nothing, and fail if a text differs from the one made from the files.
    """
    path = output or results.resolve().parent / "REPORT.md"
    tasks = load(results)
    measured = [
        csv_rows.read(results / f"{name}.csv") for name in ("estimate_quality", "batch_rise")
    ]
    slices = csv_rows.read(results / "landscapes.csv")
    texts = {path: report(tasks, *measured, step_times(results), slices=bool(slices))}
    if results.resolve() == RESULTS and output is None:
        texts[README] = renewed(README.read_text(encoding="utf-8"), results)
    if check:
        for file, text in texts.items():
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                sys.exit(f"{file} is out of date: python -m bench.report {results}")
        return
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    if slices:
        landscapes.draw_figure(slices, path.parent / LANDSCAPES)
    for task in tasks:
        draw_figures(task, {k: path.parent / p for k, p in figure_paths(task).items()}, title)
    print(path)


if __name__ == "__main__":
    cyclopts.run(main)
