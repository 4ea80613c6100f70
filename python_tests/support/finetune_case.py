"""Settings of small fine-tunes that take a second, for tests."""

from tiny_model import make_rows, save_tiny_model, write_csv

from eflat_ext.lab.finetune import comparison

METHODS = ["lora", "eflat", "flat", "lora-sam", "full"]


def make_settings(folder):
    """Settings, with a model and data in the folder."""
    return {
        "model": save_tiny_model(folder / "model"),
        "data": write_csv(folder / "data.csv", make_rows(400)),
        "max_length": 32,
        "steps": 25,
        "rank": 4,
        "lr": 5e-3,
        "device": "cpu",
    }


def one_run(config, method="lora", seed=0):
    task = comparison.prepare(config)
    model, optimizer = comparison.build(config, task, method, seed)
    return comparison.train(config, task, method, seed, model, optimizer), model, task


def figures(metrics):
    return {name: value for name, value in metrics.items() if "seconds" not in name}
