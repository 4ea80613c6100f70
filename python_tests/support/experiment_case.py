"""An experiment whose every run takes a fraction of a second, its file and its rows."""

import csv

import yaml
from tiny_model import make_rows, save_tiny_model, write_csv

SHARPNESS = {"worst_rho": 0.1, "random_rho": 0.5, "layers": ["query", "value"], "sentences": 32}


def make_content(folder):
    """What an experiment's file holds; its model and data are in the folder."""
    return {
        "settings": {
            "model": save_tiny_model(folder / "model"),
            "data": write_csv(folder / "data.csv", make_rows(400)),
            "max_length": 32,
            "validation_size": 60,
            "test_size": 80,
            "steps": 12,
            "rank": 4,
            "device": "cpu",
        },
        "tasks": {"words": {"train_size": 48}},
        "methods": {
            "lora": {"tune": {"lr": [1e-3, 1e-2]}},
            "eflat-global": {
                "method": "eflat",
                "norm_scope": "global",
                "like": "lora",
                "tune": {"rho": [0.05, 0.5]},
            },
        },
        "tuning": {"seeds": [100, 101]},
        "seeds": [0, 1, 2],
    }


def write(folder, content, **changes):
    """The experiment's file, with some of its sections replaced."""
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
