"""A small run to be measured, for the tests of ``eflat sharpness`` and ``eflat landscape``."""

import csv

from tiny_model import make_rows, save_tiny_model, write_csv

from eflat_ext import finetune
from eflat_ext.config import FinetuneConfig

SMALL = ["--examples", "40", "--batch-size", "16", "--device", "cpu"]


def make_run(folder):
    """A folder with a small model, data, and a run of three methods."""
    config = FinetuneConfig(
        model=save_tiny_model(folder / "model"),
        data=write_csv(folder / "data.csv", make_rows(300)),
        method=["lora", "eflat", "full"],
        max_length=32,
        steps=10,
        rank=4,
        lr=5e-3,
        device="cpu",
        output_dir=folder / "run",
    )
    finetune.run(config)
    return folder


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
