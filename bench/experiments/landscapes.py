"""Compute the loss around the weights that the main table's methods find, for the report's figure.

    python -m bench.experiments.landscapes [--csv bench/results/landscapes.csv] [--again]

One seed of each method is trained as in bench/experiments/movies_256.yaml, with the settings chosen
there. The training loss is then taken along three random directions in the full space of the
adapted layers, whose rows have the norms of the weight's rows (eflat_ext.landscape). A method takes
three minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cyclopts

from bench import csv_rows
from bench.experiment import METHODS as OF_BENCH
from bench.report.tables import title
from eflat_ext.analysis import landscape
from eflat_ext.analysis.full_space import adapted_layers
from eflat_ext.lab.experiment import plan
from eflat_ext.lab.experiment.plan import Run
from eflat_ext.lab.experiment.results import Results, columns_of
from eflat_ext.lab.experiment.runner import Runner
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.measure.landscape_figure import LandscapeConfig
from eflat_ext.lab.measure.landscape_figure import draw as draw_slices
from eflat_ext.lab.measure.trained_models import Trained, loss, make_batches

METHODS = {**comparison.METHODS, **OF_BENCH}
BENCH = Path(__file__).parents[1]
RESULTS = BENCH / "results" / "landscapes.csv"
EXPERIMENT = BENCH / "experiments" / "movies_256.yaml"
SHOWN = ("lora", "full", "lora-sam", "eflat")
SEEDS, DIRECTIONS, SENTENCES = (0,), 3, 128
XS = [round(-1 + k / 7, 6) for k in range(15)]


def rows_of(method: str, seed: int, file: Path = EXPERIMENT) -> Iterator[dict[str, Any]]:
    """Train once; yield a row for each direction and point."""
    grid = plan.load(file, METHODS)
    tuned = Results(grid.results, columns_of(grid)).chosen(grid, grid.tasks[0], grid.method(method))
    if tuned is None:
        raise SystemExit(f"{grid.results} lacks tuning runs of {method}")
    run = Run("final", grid.tasks[0], grid.method(method), seed, tuned)
    task, model, _ = Runner(grid, METHODS).train(run)
    some = slice(SENTENCES)
    tokens = task.train.inputs[some], task.train.labels[some]
    batches = make_batches(task.tokenizer, *tokens, 32, task.device)
    assert grid.sharpness is not None
    layers = adapted_layers(model.eval(), grid.sharpness.layers)
    for k in range(DIRECTIONS):
        direction = landscape.random_direction(layers, seed=k)
        losses = landscape.slice_1d(
            model, loss, batches, direction, XS, layers=grid.sharpness.layers
        )
        for x, value in zip(XS, losses, strict=True):
            yield {"method": method, "seed": seed, "direction": k, "x": x, "loss": value}


def draw_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the rise of the loss over its value at the centre, a curve for each method."""
    numbers = [
        {
            "run": title(row["method"]),
            "method": "",
            "sample": f"{row['seed']}, {row['direction']}",
            "x": float(row["x"]),
            "y": 0.0,
            "loss": float(row["loss"]),
        }
        for row in rows
    ]
    draw_slices(numbers, LandscapeConfig(rise=True, output=path), Trained(path, "", ""))


def main(*, csv: Path = RESULTS, again: bool = False) -> None:
    """Measure the runs that are missing in the file.

    Args:
        csv: File of the results, read and written.
        again: Repeat the runs that the file holds.
    """
    runs = [(method, seed) for seed in SEEDS for method in SHOWN]
    csv_rows.complete(csv, ("method", "seed"), runs, rows_of, again)
    print(f"{csv}: python -m bench.report bench/results draws the figure")


if __name__ == "__main__":
    cyclopts.run(main)
