"""Time a training step of every method of the main table against plain LoRA's.

    python -m bench.training.step [--runs 3] [--steps 40] [--methods NAME ...] [--json F]

The methods are those of bench/experiments/movies_256.yaml, on the sentences and batches of the main
job. In each round all methods take a step on the same batch, one after another, so that other load
on the machine affects all of them; the result of a run is the median ratio to plain LoRA's step in
the same round. The memory layout of a process shifts it by several percent, so each run is a
process of its own, and the table gives the median, least and largest run. Peak memory is the
largest resident set of a process per method.

The floor: EFlat-LoRA adds one pass over the factors and gradients, O((n + m) r^2) multiply-adds per
pair, to the O(n m) per token of the layer; Flat-LoRA and LoRA-SAM take a second gradient.
EFlat-LoRA also keeps the moving average in float32, and B + average from a layer's forward to its
backward pass.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.experiment import METHODS as OF_BENCH
from bench.timing import arguments, machine, new_plot, print_table, write_json
from eflat_ext.lab.experiment import plan
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig

BUILDERS = {**comparison.METHODS, **OF_BENCH}
PLAN = plan.load(Path(__file__).parents[1] / "experiments" / "movies_256.yaml", BUILDERS)
METHODS = {method.name: method for method in PLAN.methods}
CONFIG = FinetuneConfig(train_size=1000, test_size=100)


def stepper(task, name, batches):
    """Return a function that takes one training step of a method on batch number i."""
    method = METHODS[name]
    config = replace(CONFIG, **method.settings)
    model, optimizer = comparison.build(config, task, method.builder, 0, BUILDERS)
    model.train()

    def step(i):
        def closure():
            inputs, labels = batches[i % len(batches)]
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(**inputs).logits, labels)
            loss.backward()
            return loss.detach()

        return optimizer.step(closure)

    return step


def first_batches(task, count):
    batches = comparison.shuffled_batches(task, CONFIG.batch_size, seed=0)
    return [next(batches) for _ in range(count)]


def measure(methods, steps):
    """Measure the median ratio of each method's step to LoRA's, and LoRA's median seconds."""
    task = comparison.prepare(CONFIG)
    batches = first_batches(task, 8)
    step_of = {method: stepper(task, method, batches) for method in methods}
    seconds = {method: [] for method in methods}
    # The first rounds warm up and store a gradient of every example.
    for i in range(-len(batches), steps):
        # Rotate the order, so that no method always follows the same one.
        turn = i % len(methods)
        for method in methods[turn:] + methods[:turn]:
            start = time.perf_counter()
            step_of[method](i)
            if i >= 0:
                seconds[method].append(time.perf_counter() - start)
    ratios = {
        method: statistics.median(
            a / b for a, b in zip(seconds[method], seconds["lora"], strict=True)
        )
        for method in methods
    }
    return ratios, statistics.median(seconds["lora"])


def in_a_process(*arguments):
    """Run this script with these arguments; return the JSON of its last line."""
    command = [sys.executable, "-m", "bench.training.step", *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def peak_memory(method):
    """Return the largest resident set, in MiB, of a process that takes some steps of `method`."""
    task = comparison.prepare(CONFIG)
    batches = first_batches(task, 8)
    step = stepper(task, method, batches)
    for i in range(8):
        step(i)
    # Not getrusage's maximum, which a new process inherits from its parent.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def plot(rows, path):
    fig, ax = new_plot(figsize=(6, 2.4))
    ax.barh([row["method"] for row in rows], [row["step"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("time of a training step, plain LoRA = 1")
    fig.savefig(path)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--measure", choices=("times", "peak"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    methods = list(dict.fromkeys(["lora", *args.methods]))
    if args.measure == "times":
        return print(json.dumps(measure(methods, args.steps)))
    if args.measure == "peak":
        return print(json.dumps(peak_memory(args.methods[0])))
    call = ("--measure", "times", "--steps", str(args.steps), "--methods", *methods)
    runs = [in_a_process(*call) for _ in range(args.runs)]
    rows = []
    for method in methods:
        ratios = sorted(ratios[method] for ratios, _ in runs)
        peak = in_a_process("--measure", "peak", "--methods", method)
        rows.append(
            {
                "method": method,
                "step": statistics.median(ratios),
                "least": ratios[0],
                "largest": ratios[-1],
                "peak_mib": peak,
            }
        )
    print(f"{machine()}; LoRA's step: {statistics.median(s for _, s in runs) * 1e3:.0f} ms")
    print_table(
        ["method", "step / LoRA's step", "least", "largest", "peak memory, MiB"],
        [
            [
                row["method"],
                *(f"{row[key]:.3f}" for key in ("step", "least", "largest")),
                f"{row['peak_mib']:.0f}",
            ]
            for row in rows
        ],
    )
    write_json(args.json, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
