"""Compare EFlat-LoRA's estimate of the full-space gradient with the true one over training.

    python -m bench.experiments.estimate_quality [--csv FILE] [--again]

Adapters of rank 8 are trained with LoRA and with EFlat-LoRA: MiniLM on 256 sentences of movie
reviews and on 256 openings of news articles, with the settings of the main job, and the language
model SmolLM2-135M on answers to 64 word problems. At steps 0, 1, 20, 60 and 120 the estimates from
the factors' gradients (eflat_ext/analysis/estimate.py) are compared with the true gradient of every
adapted layer's whole weight on the same texts. The file has a row for every layer, the tables give
means over layers. Runs that the file holds are repeated with --again only. A seed takes half an
hour on one core.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import csv_rows
from bench.timing import machine, print_table

STEPS = (0, 1, 20, 60, 120)
CUTOFFS = ("default", "0.001", "0.01", "0.1")
LAYERS = ("query value", "query key value dense")
MOVIES, NEWS, MATH = "movie-reviews", "bbc-news", "math-problems"
SETTINGS: dict[str, dict[str, Any]] = {
    MOVIES: {"train_size": 256},
    NEWS: {"train_size": 256, "max_length": 64},
    MATH: {
        "task_type": "CAUSAL_LM",
        "model": "smollm2",
        "train_size": 64,
        "max_length": 96,
        "batch_size": 8,
    },
}
RUNS = (
    (MOVIES, LAYERS[0], "lora"),
    (MOVIES, LAYERS[0], "eflat"),
    (MOVIES, LAYERS[1], "lora"),
    (NEWS, LAYERS[0], "lora"),
    (NEWS, LAYERS[0], "eflat"),
    (MATH, "q_proj v_proj", "lora"),
    (MATH, "q_proj v_proj", "eflat"),
)
RESULTS = Path(__file__).parents[1] / "results" / "estimate_quality.csv"
COLUMNS = [
    "cos term A",
    "cos term B",
    "cos mean",
    "cos tangent",
    "size mean",
    "size onto B",
    "cos onto B",
    "size onto A",
    "cos onto A",
    "top share",
]


def rows_of(data: str, layers: str, method: str, seed: int) -> list[dict[str, Any]]:
    """Train with adapters on ``layers``; return rows for every step, cutoff and layer."""
    from eflat_ext.analysis.estimate import ESTIMATES, estimate_quality
    from eflat_ext.lab.finetune import comparison
    from eflat_ext.lab.finetune.config import FinetuneConfig
    from eflat_ext.lab.measure.trained_models import loss, make_batches

    config = FinetuneConfig(
        data=data,
        target_modules=layers.split(),
        steps=STEPS[-1],
        test_size=64,
        device="cpu",
        **SETTINGS[data],
    )
    task = comparison.prepare(config)
    model, optimizer = comparison.build(config, task, method, seed)
    tokens = task.train
    batches = make_batches(task.tokenizer, tokens.inputs, tokens.labels, 32, task.device)
    rtols = [None if cutoff == "default" else float(cutoff) for cutoff in CUTOFFS]
    count = itertools.count(1)
    rows: list[dict[str, Any]] = []

    def measure(step: int) -> None:
        found = estimate_quality(model, loss, batches, rtols=rtols)
        for k in range(0, len(found), len(ESTIMATES)):
            group = {one.estimate: one for one in found[k : k + len(ESTIMATES)]}
            first = found[k]
            row = {"data": data, "adapted": layers, "method": method, "seed": seed, "step": step}
            row["cutoff"] = CUTOFFS[k // len(ESTIMATES) % len(CUTOFFS)]
            row["layer"] = first.layer.removeprefix("bert.").removeprefix("model.")
            for name in COLUMNS[:-1]:
                one = group[name.partition(" ")[2]]
                row[name] = one.cosine if name.startswith("cos") else one.norm_ratio
            row |= {"top share": first.top_share, "gradient norm": first.gradient_norm}
            rows.append(row)

    def on_step(_: float) -> None:
        if (step := next(count)) in STEPS:
            measure(step)

    measure(0)
    comparison.train(config, task, method, seed, model, optimizer, on_step)
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, header and rows of each table: means over layers."""

    def part(name: str, keys: tuple[str, ...], **only: str) -> Iterator[Any]:
        chosen = [row for row in rows if all(str(row[k]) == v for k, v in only.items())]
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in chosen:
            groups.setdefault(", ".join(str(row[key]) for key in keys), []).append(row)
        if groups:
            lines = [
                [group, *(f"{statistics.fmean(float(r[c]) for r in g):.2f}" for c in COLUMNS)]
                for group, g in groups.items()
            ]
            yield name, [", ".join(keys), *COLUMNS], lines

    for row in rows:
        row["kind"] = re.sub(r"^encoder\.layer\.\d+\.", "", row["layer"])
    for data, layers in dict.fromkeys(run[:2] for run in RUNS):
        only = {"data": data, "adapted": layers, "cutoff": "default"}
        yield from part(f"{data}, adapters on {layers}", ("method", "step"), **only)
    last = {"data": MOVIES, "adapted": LAYERS[-1], "method": "lora"}
    run = f"{MOVIES}, adapters on {LAYERS[-1]}, plain LoRA"
    yield from part(
        f"{run}, step {STEPS[-1]}", ("kind",), cutoff="default", step=str(STEPS[-1]), **last
    )
    yield from part(run, ("step", "cutoff"), **last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, help="where the numbers are and go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--again", action="store_true", help="repeat the runs that the file holds")
    options = parser.parse_args()
    print(machine())
    runs = [(*run, seed) for run in RUNS for seed in options.seeds]
    columns = ("data", "adapted", "method", "seed")
    rows = csv_rows.complete(options.csv, columns, runs, rows_of, options.again)
    for name, head, lines in tables(rows):
        print(f"\n{name}")
        print_table(head, lines)


if __name__ == "__main__":
    main()
