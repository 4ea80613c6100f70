"""Make the tables of numbers in README.md from the files of bench/results.

`python -m bench.report` writes or checks them with the report. A table stands between the lines
``<!-- table: NAME -->`` and ``<!-- table: end -->``, NAME being one of :data:`TABLES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import csv_rows
from bench.kernels.cases import CASES
from bench.kernels.floor import CARDS, floor
from bench.report.summary import load, step_times
from bench.report.tables import STEP, compared_cells, percent, plain, step_rows, table, title

README = Path(__file__).parents[2] / "README.md"


def _movies(results: Path) -> str:
    """Return the main table, abridged."""
    (task,) = [t for t in load(results) if t.experiment == "movies_256"]
    accuracy, loss = task.comparisons("accuracy"), task.comparisons("loss")
    times = step_times(results)

    def row(method: str) -> list[str]:
        return [
            title(method),
            percent(task.estimate(method, "accuracy")),
            *compared_cells(accuracy.get(method), 100, 2)[::3],
            plain(task.estimate(method, "loss")),
            loss[method].verdict if method in loss else "",
            plain(task.estimate(method, "sharpness_worst")),
            f"{times[method]['step']:.2f}" if method in times else "",
        ]

    head = ["", "test accuracy, %", "over LoRA", "", "test loss", "", "sharpness", "time"]
    return table(head, [row(method) for method in task.methods])


def _few(results: Path) -> str:
    """Return the table of 64 examples, abridged."""
    (task,) = [t for t in load(results) if t.name == "movies-64-noise0"]
    accuracy, loss, typos = (task.comparisons(f) for f in ("accuracy", "loss", "loss@typos"))

    def row(method: str) -> list[str]:
        return [
            title(method),
            *compared_cells(accuracy.get(method), 100, 2)[::3],
            plain(task.estimate(method, "loss")),
            *compared_cells(loss.get(method), 1, 3)[::3],
            *compared_cells(typos.get(method), 1, 3)[::3],
        ]

    head = ["", "accuracy over LoRA", "", "test loss", "over LoRA", "", "misspelt, over LoRA", ""]
    return table(head, [row(method) for method in task.methods])


def _tasks(results: Path) -> str:
    """Return the comparison of EFlat-LoRA with LoRA on every task with tuning."""
    rows = []
    for task in load(results):
        if task.is_tuned() and "eflat" in task.methods:
            accuracy, loss, gap = (
                task.comparisons(f)["eflat"] for f in ("accuracy", "loss", "gap")
            )
            cells = [
                compared_cells(accuracy, 100, 2),
                *(compared_cells(c, 1, 3) for c in (loss, gap)),
            ]
            baseline = percent(task.estimate("lora", "accuracy"))
            rows.append([task.name, baseline, *(cell for four in cells for cell in four[::3])])
    head = ["", "LoRA's accuracy, %", "over LoRA", "", "test loss, over LoRA", "", "gap, over LoRA"]
    return table([*head, ""], rows)


def _demo(results: Path) -> str:
    rows = [
        [
            title(row["method"]),
            f"{100 * float(row['accuracy']):.2f} %",
            *(f"{float(row[name]):.4f}" for name in ("loss", "train_loss")),
        ]
        for row in csv_rows.read(results / "demo.csv")
    ]
    return table(["", "accuracy", "test loss", "training loss"], rows)


def _perturb_cpu(results: Path) -> str:
    head = ["pairs", "threads", "time", "equations (1)-(3) with `pinv`"]
    head += ["Gram form, float64", "Gram form, float32", "share of the floor"]
    rows = []
    for threads in (2, 1):
        for x in _json(results, f"perturb_cpu_{threads}")["cases"][:2]:
            slower = [f"{x['over_pinv']:.0f} x", f"{x['over_gram64']:.1f} x"]
            slower += [f"{x['over_gram32']:.1f} x", f"{x['share_of_floor']:.0%}"]
            rows.append([x["case"], str(threads), f"{1e3 * x['seconds']:.2f} ms", *slower])
    return table(head, rows)


def _accuracy(results: Path) -> str:
    found = _json(results, "accuracy")
    rows = [
        [f"condition {x['condition']:g}", *(f"{x[k]:.1e}" for k in ("operator", "pinv", "Gram"))]
        for x in found
        if x["dtype"] == "torch.float32" and x["condition"] in (1, 1e3, 1e6)
    ]
    return table(["", "operator", "float32 `pinv`", "float32 Gram form"], rows)


def _step(results: Path) -> str:
    return table(STEP, step_rows(step_times(results)))


def _fused_step(results: Path) -> str:
    """Return the times of the fused step over the unfused one, by AdamW implementation."""
    rows = []
    for threads in (1, 2):
        found = {x["step"]: x["seconds"] for x in _json(results, f"fused_step_{threads}")}
        over = [found["fused"] / found[f"unfused, {kind}"] for kind in ("foreach", "fused")]
        rows.append([str(threads), *(f"{ratio:.2f}" for ratio in over)])
    return table(["threads", "AdamW's foreach implementation", "AdamW's own `fused=True`"], rows)


def _floor(results: Path) -> str:
    cases = [case for case in CASES if case.name.startswith("Llama")]
    head = [f"{kind}, r={case.rank}" for case in cases for kind in ("memory", "arithmetic")]
    rows = []
    for card in CARDS:
        times = [floor(case, torch.float32, card) for case in cases]
        name = card.name if card.products else f"{card.name} (pairs of floats)"
        rows.append([name, *(_time(t[k]) for t in times for k in ("memory", "arithmetic"))])
    return table(["", *head], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "movies": _movies,
    "few": _few,
    "tasks": _tasks,
    "demo": _demo,
    "perturb_cpu": _perturb_cpu,
    "accuracy": _accuracy,
    "step": _step,
    "fused_step": _fused_step,
    "floor": _floor,
}


def renewed(readme: str, results: Path) -> str:
    """Return the README's text with its tables made from the files of ``results``."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](results)}\n\n{match[3]}"

    between = r"(<!-- table: (\w+) -->\n).*?(<!-- table: end -->)"
    return re.sub(between, block, readme, flags=re.S)


def _json(results: Path, name: str) -> Any:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["results"]


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2g} ms"
