"""How good EFlat-LoRA's estimate of the full-space gradient is over training.

    python bench/estimate_quality.py [--csv bench/results/estimate_quality.csv]

MiniLM with LoRA of rank 8, on 256 sentences of the movie reviews with the settings of the main job,
by plain LoRA and by EFlat-LoRA. At steps 0, 1, 20, 60 and 120 the true gradient of every adapted
layer's whole weight, on the same sentences, is compared with what the factors' gradients tell of
it: the tables give means over layers of cosines and ratios of norms (eflat_ext.estimate says of what),
the file every layer's own. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from dataclasses import asdict
from pathlib import Path

from timing import machine, print_table

from eflat_ext import finetune
from eflat_ext.config import FinetuneConfig
from eflat_ext.estimate import estimate_quality
from eflat_ext.trained import loss, make_batches

STEPS = (0, 1, 20, 60, 120)
RTOLS = (None, 1e-3, 1e-2, 1e-1)
KINDS = ("query", "key", "value", "dense")
RESULTS = Path(__file__).parent / "results" / "estimate_quality.csv"
COLUMNS = [
    ("cosine", "term A"),
    ("cosine", "term B"),
    ("cosine", "mean"),
    ("cosine", "tangent"),
    ("norm_ratio", "mean"),
    ("norm_ratio", "onto B"),
    ("cosine", "onto B"),
    ("norm_ratio", "onto A"),
    ("cosine", "onto A"),
]


def rows_of(layers: tuple[str, ...], method: str, seed: int) -> list[dict[str, object]]:
    """A run with adapters on ``layers``: a row for each step, layer, cutoff and estimate."""
    config = FinetuneConfig(
        train_size=256, target_modules=list(layers), steps=STEPS[-1], test_size=64, device="cpu"
    )
    task = finetune.prepare(config)
    model, optimizer = finetune.build(config, task, method, seed)
    tokens = task.train
    batches = make_batches(task.tokenizer, tokens.inputs, tokens.labels, 32, task.device)
    rows: list[dict[str, object]] = []
    count = itertools.count(1)

    def measure(step: int) -> None:
        for k, row in enumerate(estimate_quality(model, loss, batches, rtols=RTOLS)):
            cutoff = RTOLS[k // 6 % len(RTOLS)]
            kind = ".".join(row.layer.split(".")[4:])
            about = {"method": method, "seed": seed, "adapted": " ".join(layers), "step": step}
            about |= {"kind": kind, "cutoff": "default" if cutoff is None else f"{cutoff:g}"}
            rows.append(about | asdict(row))

    def on_step(_: float) -> None:
        if (step := next(count)) in STEPS:
            measure(step)

    measure(0)
    finetune.train(config, task, method, seed, model, optimizer, on_step)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    header = ["cos A", "cos B", "cos mean", "cos tangent", "|mean|/|G|"]
    header += ["|onto B|/rho", "cos onto B", "|onto A|/rho", "cos onto A", "top share"]

    def unique(*keys: str) -> list[tuple[object, ...]]:
        return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))

    def part(title: str, keys: tuple[str, ...], only: dict[str, object]) -> None:
        chosen = [row for row in rows if all(row[k] == v for k, v in only.items())]
        lines = []
        for values in dict.fromkeys(tuple(row[key] for key in keys) for row in chosen):
            group = [r for r in chosen if tuple(r[key] for key in keys) == values]
            line = [", ".join(map(str, values))]
            for measure, estimate in COLUMNS:
                numbers = [r[measure] for r in group if r["estimate"] == estimate]
                line.append(f"{statistics.fmean(numbers):.2f}")
            line.append(f"{statistics.fmean(r['top_share'] for r in group):.2f}")
            lines.append(line)
        print(f"\n{title}")
        print_table([", ".join(keys), *header], lines)

    for (adapted,) in unique("adapted"):
        part(
            f"adapters on {adapted}, default cutoff",
            ("method", "step"),
            {"adapted": adapted, "cutoff": "default"},
        )
    part(
        f"plain LoRA on {' '.join(KINDS)}, default cutoff, last step",
        ("kind",),
        {"adapted": " ".join(KINDS), "cutoff": "default", "method": "lora", "step": STEPS[-1]},
    )
    part(
        f"plain LoRA on {' '.join(KINDS)}",
        ("step", "cutoff"),
        {"adapted": " ".join(KINDS), "method": "lora"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, help="where the numbers go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print(machine())
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for layers in (("query", "value"), KINDS):
        for method in ("lora", "eflat"):
            for seed in options.seeds:
                rows += rows_of(layers, method, seed)
                write(options.csv, rows)
    show(rows)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


if __name__ == "__main__":
    main()
