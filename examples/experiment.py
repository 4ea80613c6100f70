"""Compare LoRA, EFlat-LoRA and a custom method, tuned on the validation part.

python examples/experiment.py [--steps 8]
"""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Any

import cyclopts
import torch

from eflat_ext.lab.experiment import runner
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.optim.factories import trainable_parameters

FILE = """
settings:
  data: movie-reviews
  max_length: 32
  validation_size: 40
  test_size: 40
  batch_size: 8
  steps: {steps}
tasks:
  movies: {{train_size: 48, also_test: [typos]}}
methods:
  lora: {{tune: {{lr: [3e-3, 1e-2]}}}}
  eflat: {{like: lora, tune: {{rho: [0.05, 0.1]}}}}
  sgd: {{lr: 0.1}}
tuning: {{seeds: [100], choose_by: accuracy}}
seeds: [0, 1]
"""


def sgd(config: FinetuneConfig, model: Any, steps: int) -> torch.optim.Optimizer:
    """Return the custom method's optimizer: SGD over the trainable parameters."""
    return torch.optim.SGD(trainable_parameters(model), lr=config.lr)


def main(steps: int = 8) -> None:
    """Run all methods, then EFlat-LoRA again, whose rows exist already.

    Args:
        steps: Optimizer steps of a run, 8 sentences each.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "movies.yaml")
        file.write_text(FILE.format(steps=steps), encoding="utf-8")
        results = runner.run(file, methods={"sgd": sgd})
        runner.run(file, method=["eflat"], methods={"sgd": sgd})
        with results.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if row["stage"] == "final":
                    print(row["method"], row["seed"], row["accuracy"], row["accuracy@typos"])


if __name__ == "__main__":
    cyclopts.run(main)
