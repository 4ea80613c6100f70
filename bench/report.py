"""Write bench/REPORT.md and its figures from the CSV files of experiments, and from nothing else.

python bench/report.py bench/results            write them
python bench/report.py bench/results --check    fail if REPORT.md is not what they say
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cyclopts
from report_figures import draw_figures
from summary import BASELINE, LEVEL, Comparison, Estimate, TaskResults, load

TITLES = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "lora-sam": "LoRA-SAM",
    "flat": "Flat-LoRA",
    "eflat": "EFlat-LoRA",
    "eflat-global": "EFlat-LoRA, global norm",
    "eflat-A": "EFlat-LoRA onto A",
    "eflat-A-global": "EFlat-LoRA onto A, global norm",
    "random-flat": "Flat-LoRA by random perturbation",
    "bi-lora": "Bi-LoRA",
    "eflat-full": "EFlat-LoRA without transfer",
    "eflat-tangent": "EFlat-LoRA, tangent space",
    "eflat-restored": "EFlat-LoRA, radius restored",
    "sketch-1": "sketch of the gradient, rank 1",
    "sketch-4": "sketch of the gradient, rank 4",
}

HEAD = """# Does it generalise better, is it flatter, and what does it cost?

Written by `python bench/report.py bench/results` from the CSV files there; do not edit. The
experiments are in bench/experiments/, and `python bench/experiment.py FILE --jobs 2` runs one.

Figures are means over seeds ± one standard error. One seed means the same training sentences,
batches, first weights and number of steps for all methods, so methods are compared with {baseline}
seed by seed: mean difference, and p of a paired t-test with Holm's correction over the methods of a
table. A method *wins* or *loses* where p < {level:g}, else it *ties*. Settings were chosen on
a validation part with other seeds. The gap is test less training loss. Sharpness is the rise of
the training loss in the full space of the adapted layers, in the worst direction and under random
noise. Time and memory are medians of the ratio to {baseline}; memory is the whole process's.
"""


def title(method: str) -> str:
    """What the report calls a method."""
    return TITLES.get(method, method)


def report(tasks: Sequence[TaskResults]) -> str:
    """The whole report as Markdown."""
    if not tasks:
        raise SystemExit("there is no CSV file of an experiment")
    parts = [HEAD.format(baseline=title(BASELINE), level=LEVEL), *_overview(tasks)]
    for task in tasks:
        parts += [f"## {task.name} ({task.experiment})", _sentences(task)]
        parts += [_accuracy_table(task, "accuracy", "test accuracy"), _loss_table(task)]
        parts += [_accuracy_table(task, f"accuracy@{d}", f"accuracy on {d}") for d in task.tests()]
        parts += [_cost_table(task), _correlation(task), _tuned_table(task), _failures(task)]
        parts += [f"![{kind} of {task.name}]({path})" for kind, path in figure_paths(task).items()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def figure_paths(task: TaskResults) -> dict[str, str]:
    """The figures of a task, by what they show, relative to the report."""
    name = f"figures/{task.experiment}-{task.name}"
    paths = {"Accuracy": f"{name}-accuracy.svg", "Tuning": f"{name}-tuning.svg"}
    if task.points("sharpness_worst", "gap"):
        paths["Sharpness and gap"] = f"{name}-sharpness.svg"
    return paths


# --- words -------------------------------------------------------------------------------


KINDS = {
    "accuracy": "Accuracy",
    "loss": "Test loss",
    "gap": "Gap",
    "sharpness_worst": "Worst-case sharpness",
}
VERDICTS = ("wins", "ties", "loses")


def _overview(tasks: Sequence[TaskResults]) -> list[str]:
    """Wins, ties and losses of each method over all tasks and test sets."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for task in tasks:
        for figure in _compared(task):
            for method, comparison in task.comparisons(figure).items():
                by_kind = counts.setdefault(method, {kind: Counter() for kind in KINDS})
                by_kind[figure.split("@")[0]][comparison.verdict] += 1
    rows = [
        [title(method), *(" / ".join(str(by_kind[kind][v]) for v in VERDICTS) for kind in KINDS)]
        for method, by_kind in counts.items()
    ]
    if not rows:
        return []
    over = f"How often a method {' / '.join(VERDICTS)} against {title(BASELINE)} over "
    over += f"{_number(len(tasks), 'task')} and all their test sets:"
    return ["## Overview", over, _table(["", *KINDS.values()], rows)]


def _compared(task: TaskResults) -> list[str]:
    """The figures that methods are compared by."""
    also = [f"{figure}@{data}" for data in task.tests() for figure in ("accuracy", "loss")]
    return ["accuracy", "loss", *also, "gap", "sharpness_worst"]


def _sentences(task: TaskResults) -> str:
    """Who wins, ties and loses, in words."""
    counts = [len(task.runs(method)) for method in task.methods]
    low, high = min(counts), max(counts)
    finished = str(low) if low == high else f"{low} to {high}"
    lines = [f"Finished final runs of each method: {finished}.", ""]
    for figure in _compared(task):
        kind, _, data = figure.partition("@")
        if comparisons := task.comparisons(figure):
            groups = [_group(comparisons, verdict, kind) for verdict in VERDICTS]
            where = f" on {data}" if data else ""
            against = f"{KINDS[kind]}{where} against {title(BASELINE)}"
            lines.append(f"* {against} — {'; '.join(groups)}.")
    return "\n".join(lines)


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
        found = task.correlation(figure, "gap")
        if found is not None:
            r, low, high, count = found
            lines.append(
                f"Correlation of {name} sharpness with the gap over all {count} final runs: "
                f"r = {r:.2f}, 95 % interval {low:.2f} to {high:.2f}."
            )
    return "\n".join(lines)


def _failures(task: TaskResults) -> str:
    lines = [
        f"* {row['stage']}, {title(row['method'])}, {_settings(json.loads(row['tuned']))}, "
        f"seed {row['seed']}: {row['error']}"
        for row in task.failures()
    ]
    return "\n".join([f"{_number(len(lines), 'run')} failed:", "", *lines]) if lines else ""


# --- tables ------------------------------------------------------------------------------


def _accuracy_table(task: TaskResults, figure: str, name: str) -> str:
    comparisons = task.comparisons(figure)
    rows = []
    for method in task.methods:
        compared = _compared_cells(comparisons.get(method), 100, 2)
        rows.append([title(method), _percent(task.estimate(method, figure)), *compared])
    return _table(["", f"{name}, %", *_COMPARED], rows)


def _loss_table(task: TaskResults) -> str:
    comparisons = task.comparisons("loss")
    rows = []
    for method in task.methods:
        loss, train, gap = (task.estimate(method, f) for f in ("loss", "train_loss", "gap"))
        compared = _compared_cells(comparisons.get(method), 1, 4)
        rows.append([title(method), _plain(loss), *compared, _plain(train), _plain(gap)])
    return _table(["", "test loss", *_COMPARED, "training loss", "gap"], rows)


def _cost_table(task: TaskResults) -> str:
    rows = []
    for method in task.methods:
        sharp = [task.estimate(method, f"sharpness_{kind}") for kind in ("worst", "random")]
        time, memory = (task.ratio(method, f) for f in ("seconds_per_step", "peak_memory_mib"))
        parameters = task.estimate(method, "trainable_parameters")
        rows.append(
            [title(method), *map(_plain, sharp)]
            + ["" if value is None else f"{value:.2f}" for value in (time, memory)]
            + ["" if parameters is None else f"{parameters.mean:,.0f}"]
        )
    head = ["", "worst-case sharpness", "random-noise sharpness"]
    return _table([*head, "relative time", "relative memory", "trained numbers"], rows)


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
    return _table([*head, "tuning runs", "final runs", "failed"], rows)


_COMPARED = ["difference", "95 % interval", "p", "verdict"]


def _compared_cells(comparison: Comparison | None, scale: float, digits: int) -> list[str]:
    if comparison is None:
        return ["", "", "", ""]
    c = comparison
    interval = f"{scale * c.low:+.{digits}f} to {scale * c.high:+.{digits}f}"
    difference = (
        f"{scale * c.difference.mean:+.{digits}f} ± {scale * c.difference.error:.{digits}f}"
    )
    return [difference, interval, f"{c.p:.3f}" if c.p >= 0.001 else "< 0.001", c.verdict]


def _percent(estimate: Estimate | None) -> str:
    return _with_error(estimate, 100, 2)


def _plain(estimate: Estimate | None) -> str:
    return _with_error(estimate, 1, 4)


def _with_error(estimate: Estimate | None, scale: float, digits: int) -> str:
    if estimate is None:
        return ""
    text = f"{scale * estimate.mean:.{digits}f}"
    return text + (f" ± {scale * estimate.error:.{digits}f}" if estimate.count > 1 else "")


def _signed(comparison: Comparison, kind: str) -> str:
    if kind == "accuracy":
        return f"{100 * comparison.difference.mean:+.2f} points"
    return f"{comparison.difference.mean:+.4f}"


def _settings(tuned: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in tuned.items()) or "nothing to tune"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns without a cell are left out."""
    used = [k for k in range(len(head)) if k == 0 or any(row[k] for row in rows)]
    lines = [[head[k] for k in used], ["---"] * len(used), *[[r[k] for k in used] for r in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(results: Path, *, output: Path | None = None, check: bool = False) -> None:
    """Write the report, or check it.

    Args:
        results: folder of CSV files.
        output: the report; by default REPORT.md beside the folder.
        check: write nothing, and fail if the report is not what the CSV files say.
    """
    path = output or results.resolve().parent / "REPORT.md"
    tasks = load(results)
    text = report(tasks)
    if check:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is out of date: python bench/report.py {results}")
        return
    path.write_text(text, encoding="utf-8")
    for task in tasks:
        draw_figures(task, {k: path.parent / p for k, p in figure_paths(task).items()}, title)
    print(path)


if __name__ == "__main__":
    cyclopts.run(main)
