"""What a training step costs: EFlat-LoRA and its peers against plain LoRA on the main job.

    python bench/step.py [--steps 60] [--json FILE] [--plot FILE]

Every method takes its step on the same batch, one after another, round by round, so that the
machine's mood is the same for all of them; the table gives medians of the ratio to plain LoRA's
step in the same round. Peak memory is the resident set of a process of its own per method.

The floor: a step's extra work beyond LoRA's is one pass over the factors and gradients,
O((n + m) r^2) multiply-adds per pair, beside the O(n m) per token of the layer itself; Flat-LoRA
and LoRA-SAM take a second gradient. Extra memory of EFlat-LoRA: a clean copy of B and the moving
average, both float32.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch
from timing import arguments, machine, new_plot, print_table, write_json

from eflat_ext import finetune
from eflat_ext.config import FinetuneConfig

METHODS = ["lora", "eflat", "flat", "lora-sam"]


def stepper(config, task, method, batches):
    """A function that takes one training step of `method` on batch number i."""
    model, optimizer = finetune.build(config, task, method, seed=0)
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


def first_batches(config, task, count):
    batches = finetune._shuffled_batches(task, config.batch_size, seed=0)
    return [next(batches) for _ in range(count)]


def measure(steps):
    """Median ratio of each method's step to LoRA's, and LoRA's median seconds."""
    config = FinetuneConfig(train_size=1000, test_size=100)
    task = finetune.prepare(config)
    batches = first_batches(config, task, 8)
    step_of = {method: stepper(config, task, method, batches) for method in METHODS}
    seconds = {method: [] for method in METHODS}
    for i in range(-3, steps):
        # A different one starts each round: none always runs with a cache warmed by the same.
        for method in METHODS[i % len(METHODS) :] + METHODS[: i % len(METHODS)]:
            start = time.perf_counter()
            step_of[method](i)
            if i >= 0:
                seconds[method].append(time.perf_counter() - start)
    ratios = {
        method: statistics.median(
            a / b for a, b in zip(seconds[method], seconds["lora"], strict=True)
        )
        for method in METHODS
    }
    return ratios, statistics.median(seconds["lora"])


def peak_memory(method):
    """MiB of the largest resident set of a process that takes some steps of `method`."""
    command = [sys.executable, __file__, "--peak-of", method]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def print_peak(method):
    config = FinetuneConfig(train_size=1000, test_size=100)
    task = finetune.prepare(config)
    batches = first_batches(config, task, 8)
    step = stepper(config, task, method, batches)
    for i in range(8):
        step(i)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def plot(rows, path):
    fig, ax = new_plot(figsize=(6, 2.4))
    ax.barh([row["method"] for row in rows], [row["step"] for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("time of a training step, plain LoRA = 1")
    fig.savefig(path)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(args.peak_of)
    ratios, seconds = measure(args.steps)
    rows = [
        {"method": method, "step": ratios[method], "peak_mib": peak_memory(method)}
        for method in METHODS
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
