"""What a training step costs: every method of the main table against plain LoRA.

    python bench/step.py [--steps 60] [--methods NAME ...] [--json FILE] [--plot FILE]

The methods are those of bench/experiments/movies_256.yaml, on the sentences and batches of the main
job. Every method takes its step on the same batch, one after another, round by round, so that the
machine's mood is the same for all of them; the table gives medians of the ratio to plain LoRA's
step in the same round. Peak memory is the resident set of a process of its own per method.

The floor: EFlat-LoRA's extra work beyond LoRA's is one pass over the factors and gradients,
O((n + m) r^2) multiply-adds per pair, beside the O(n m) per token of the layer itself; Flat-LoRA
and LoRA-SAM take a second gradient. EFlat-LoRA's extra memory: a clean copy of B and the moving
average, both float32.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from experiment import METHODS as OF_BENCH
from timing import arguments, machine, new_plot, print_table, write_json

from eflat_ext import finetune, plan
from eflat_ext.config import FinetuneConfig

BUILDERS = {**finetune.METHODS, **OF_BENCH}
PLAN = plan.load(Path(__file__).parent / "experiments" / "movies_256.yaml", BUILDERS)
METHODS = {method.name: method for method in PLAN.methods}
CONFIG = FinetuneConfig(train_size=1000, test_size=100)


def stepper(task, name, batches):
    """A function that takes one training step of a method on batch number i."""
    method = METHODS[name]
    config = replace(CONFIG, **method.settings)
    model, optimizer = finetune.build(config, task, method.builder, 0, BUILDERS)
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
    batches = finetune.shuffled_batches(task, CONFIG.batch_size, seed=0)
    return [next(batches) for _ in range(count)]


def measure(methods, steps):
    """Median ratio of each method's step to LoRA's, and LoRA's median seconds."""
    task = finetune.prepare(CONFIG)
    batches = first_batches(task, 8)
    step_of = {method: stepper(task, method, batches) for method in methods}
    seconds = {method: [] for method in methods}
    # The first rounds warm up, and leave a gradient of every example.
    for i in range(-len(batches), steps):
        # A different one starts each round: none always runs with a cache warmed by the same.
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


def peak_memory(method):
    """MiB of the largest resident set of a process that takes some steps of `method`."""
    command = [sys.executable, __file__, "--peak-of", method]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def print_peak(method):
    task = finetune.prepare(CONFIG)
    batches = first_batches(task, 8)
    step = stepper(task, method, batches)
    for i in range(8):
        step(i)
    # Not getrusage's maximum, which a new process takes over from its parent.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def plot(rows, path):
    fig, ax = new_plot(figsize=(6, 2.4))
    ax.barh([row["method"] for row in rows], [row["step"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("time of a training step, plain LoRA = 1")
    fig.savefig(path)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(args.peak_of)
    methods = list(dict.fromkeys(["lora", *args.methods]))
    ratios, seconds = measure(methods, args.steps)
    rows = [
        {"method": method, "step": ratios[method], "peak_mib": peak_memory(method)}
        for method in methods
    ]
    print(f"{machine()}; LoRA's step: {seconds * 1e3:.0f} ms")
    print_table(
        ["method", "step / LoRA's step", "peak memory, MiB"],
        [[row["method"], f"{row['step']:.3f}", f"{row['peak_mib']:.0f}"] for row in rows],
    )
    write_json(args.json, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
