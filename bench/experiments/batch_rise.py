"""Measure how much of the loss rise along a batch's own gradient other gradients find.

    python -m bench.experiments.batch_rise [--csv bench/results/batch_rise.csv] [--again]

SAM perturbs the factors along the gradient of the batch that it then trains on, which takes two
gradients per step. Methods with one gradient perturb along gradients that they have already. Here
plain LoRA trains MiniLM on few movie-review sentences, and at every fourth step the batch's loss is
taken at LoRA-SAM's radius along each of

"another batch"   the gradient of another batch at the same weights
"four batches"    the sum over four other batches
"last step"       the gradient of the step before, of another batch
"average"         the moving average of these, with EFlat-LoRA's beta
"remembered"      the sum of the gradients that the batch's examples had an epoch before
                  (bench/methods/remembered.py)

and compared with the rise along the batch's current gradient, without dropout. The tables give the
share of that rise (ratio of sums over batches) and the cosine, over quarters of the training and
over all of it. A run takes a minute on one core.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy

from bench import csv_rows
from bench.methods.remembered import Memory, examples_of, moves
from bench.timing import machine, print_table
from eflat_ext.lab.experiment.runner import draw
from eflat_ext.lab.finetune import comparison
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.optim.factories import trainable_parameters

RESULTS = Path(__file__).parents[1] / "results" / "batch_rise.csv"
STEPS, EVERY, QUARTERS = 128, 4, 4
RHO, LR = 0.05, 3e-3  # the radius of the defaults, the learning rate that LoRA's tuning chose
DIRECTIONS = ("another batch", "four batches", "last step", "average", "remembered")
CONFIG = FinetuneConfig(steps=STEPS, batch_size=8, lr=LR, test_size=64, device="cpu")


def rows_of(examples: int, seed: int, config: FinetuneConfig = CONFIG) -> Iterator[dict[str, Any]]:
    """Train on at least two batches; yield rows of all directions at each measured step."""
    task = draw(comparison.prepare(config), examples, 0.0, seed)
    model, optimizer = comparison.build(config, task, "lora", seed)
    rate = comparison.warmup_then_linear(config, task.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    memory = Memory(model)
    factors = memory.factors
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def backward(batch: Any) -> Tensor:
        """Return the gradient of the factors, flattened."""
        optimizer.zero_grad()
        cross_entropy(comparison.logits_of(config, model, batch[0]), batch[1]).backward()
        return torch.cat([p.grad.flatten() for p in factors if p.grad is not None])

    @torch.no_grad()
    def loss_at(batch: Any, direction: Tensor) -> float:
        moved = {name_of[f]: f + move for f, move in moves(factors, direction, RHO).items()}

        def there(**inputs: Tensor) -> Any:
            return functional_call(model, moved, kwargs=inputs)

        return float(cross_entropy(comparison.logits_of(config, there, batch[0]), batch[1]))

    def fresh(batch: Any) -> Any:
        """Return a batch that shares no example with this one."""
        taken = set(examples_of(batch[0]))
        order = torch.randperm(len(task.train), generator=generator).tolist()
        free = [i for i in order if tuple(task.train.inputs[i]["input_ids"]) not in taken]
        return comparison.collate(task, task.train, free[: config.batch_size])

    last = torch.zeros(sum(factor.numel() for factor in factors))
    average = last
    batches = comparison.shuffled_batches(task, config.batch_size, seed)
    for step, batch in zip(range(task.steps), batches, strict=False):
        known = examples_of(batch[0])
        if step % EVERY == EVERY - 1:
            model.train()
            four = [backward(fresh(batch)) for _ in range(4)]
            remembered = memory.recall(known)
            found = {
                "another batch": four[0],
                "four batches": torch.stack(four).sum(0),
                "last step": last,
                "average": average,
                "remembered": torch.zeros_like(last) if remembered is None else remembered,
            }
            # Dropout would hide the rises; methods have gradients with dropout.
            model.eval()
            own = backward(batch)
            loss = loss_at(batch, torch.zeros_like(own))
            own_rise = loss_at(batch, own) - loss
            for name, direction in found.items():
                yield {
                    "examples": examples,
                    "seed": seed,
                    "step": step + 1,
                    "direction": name,
                    "cosine": float(cosine_similarity(own, direction, dim=0)),
                    "rise": loss_at(batch, direction) - loss,
                    "own rise": own_rise,
                }
        model.train()
        last = backward(batch)
        memory.keep(known)
        average = average.lerp(last, config.beta)
        torch.nn.utils.clip_grad_norm_(trainable_parameters(model), config.max_grad_norm)
        optimizer.step()
        schedule.step()


def tables(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, header and rows of each table: shares of the rise and cosines."""
    size = STEPS // QUARTERS
    parts = [range(k * size + 1, (k + 1) * size + 1) for k in range(QUARTERS)]
    head = [f"steps {part[0]} to {part[-1]}" for part in parts] + ["all steps"]
    for examples in dict.fromkeys(row["examples"] for row in rows):
        runs = len({row["seed"] for row in rows if row["examples"] == examples})
        lines = []
        for name in DIRECTIONS:
            line = [name]
            for steps in (*parts, range(1, STEPS + 1)):
                found = [
                    row
                    for row in rows
                    if (row["examples"], row["direction"]) == (examples, name)
                    and int(row["step"]) in steps
                ]
                rise, own = (sum(float(row[c]) for row in found) for c in ("rise", "own rise"))
                cosine = statistics.fmean(float(row["cosine"]) for row in found)
                line.append(f"{rise / own:.2f} ({cosine:.2f})")
            lines.append(line)
        title = f"{examples} examples, share of the rise (cosine), {runs} seeds"
        yield title, ["gradient", *head], lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--csv", type=Path, default=RESULTS, help="where the numbers are and go")
    parser.add_argument("--examples", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--again", action="store_true", help="repeat the runs that the file holds")
    options = parser.parse_args()
    print(machine())
    runs = itertools.product(options.examples, options.seeds)
    rows = csv_rows.complete(options.csv, ("examples", "seed"), runs, rows_of, options.again)
    for name, head, lines in tables(rows):
        print(f"\n{name}")
        print_table(head, lines)


if __name__ == "__main__":
    main()
