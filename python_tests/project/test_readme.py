"""The README's examples and commands run; its links exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import lora_gpt2, lora_weights
from tiny_model import make_rows, save_tiny_model, write_csv

from eflat_ext.lab import cli
from eflat_ext.lab.experiment import plan
from eflat_ext.lab.finetune import comparison

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(title: str) -> str:
    """Return the Python block below a heading."""
    section = README.split(f"### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    return block


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (2, 8))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.filterwarnings("ignore")  # PEFT looks for the base model's card
def test_the_plain_loop_trains_and_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = lora_gpt2()
    before = [b.detach().clone() for b in lora_weights(model)]
    exec(example("In a plain loop"), {"model": model, "batches": [batch() for _ in range(3)]})
    assert all(bool((b != x).any()) for b, x in zip(lora_weights(model), before, strict=True))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_an_attached_optimizer_trains_as_the_plain_loop(tmp_path, monkeypatch):
    """The optimizer keeps the perturbation alive and saves its averages."""
    monkeypatch.chdir(tmp_path)
    batches, trained = [batch() for _ in range(3)], []
    for title in ("In a plain loop", "With an optimizer that exists already"):
        names = {"model": lora_gpt2(), "batches": batches}
        exec(example(title), names)
        trained.append(lora_weights(names["model"]))
    for b, expected in zip(*trained, strict=True):
        torch.testing.assert_close(b, expected)
    state = names["optimizer"].state_dict()["state"].values()
    averages = [entry["perturbation_ema"] for entry in state if "perturbation_ema" in entry]
    assert len(averages) == len(trained[0]) and all(average.any() for average in averages)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("title", "method"),
    [("In Hugging Face Trainer", "AdamW"), ("Two gradients in Trainer", "FlatLoRA")],
)
def test_trainers_train_and_log(title, method, tmp_path):
    from transformers import TrainingArguments, __version__

    model = lora_gpt2()
    before = [b.detach().clone() for b in lora_weights(model)]
    settings = {"max_steps": 3, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], **settings)
    row = {name: tensor[0].tolist() for name, tensor in batch().items()}
    names = {"model": model, "arguments": arguments, "dataset": [row] * 24}
    code = example(title)
    if __version__.startswith("4."):
        code = code.replace("_optimizer(arguments,", "_optimizer(arguments, model=model,")
    exec(code, names)
    assert all(bool((b != x).any()) for b, x in zip(lora_weights(model), before, strict=True))
    optimizer = names["trainer"].optimizer.optimizer
    assert type(optimizer).__name__ == method
    logged = [e for e in names["trainer"].state.log_history if "loss" in e]
    assert len(logged) == 3 and all(e["perturbation_norm"] > 0 for e in logged)


def test_operators_return_perturbations_and_norms():
    names = {}
    exec(example("As operators"), names)
    E, norm = names["E"], names["norm"]
    assert E.shape == names["B"].shape and float(norm) > 0
    assert len(names["Es"]) == 2 and names["norms"].shape == (2,)


# Options that make the README's commands small.
SMALL = {
    "finetune": "--model {tiny} --data {data} --device cpu --steps 3 --max-length 32",
    "sharpness": "--device cpu --samples 2 --examples 16",
    "landscape": "--device cpu --points 3 --examples 16",
}


def commands(title: str) -> list[list[str]]:
    """Return the commands in the block below a heading."""
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, flags=re.S)
    return [line.split() for line in block.splitlines()]


def test_commands_that_measure_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = save_tiny_model(tmp_path / "tiny")
    data = write_csv(tmp_path / "data.csv", make_rows(200))
    lines = [line for line in commands("Measuring flatness") if line[0] == "eflat"]
    assert {line[1] for line in lines} == set(SMALL)
    for _, command, *rest in lines:
        small = SMALL[command].format(tiny=tiny, data=data).split()
        assert cli.main([command, *rest, *small]) == 0
    assert (tmp_path / "landscape.svg").is_file()


def methods_of_experiments():
    return {**comparison.METHODS, **importlib.import_module("bench.experiment").METHODS}


def test_benchmarks_that_measure_exist_and_print_their_tables():
    methods = methods_of_experiments()
    for _, _, module, *rest in (c for c in commands("Measuring flatness") if c[0] == "python"):
        assert importlib.util.find_spec(module)
        if module == "bench.experiment":
            assert plan.load(ROOT / rest[0], methods).count() > 0
        elif module == "bench.report":  # test_report_bench.py runs it
            assert (ROOT / rest[0]).is_dir()
        else:  # it prints the tables of the numbers in bench/results
            command = [sys.executable, "-m", module, *rest]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            assert "cos onto B" in done.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "experiments").glob("*.yaml")))
def test_files_of_experiments_load(file):
    grid = plan.load(file, methods_of_experiments())
    assert grid.results.parent == ROOT / "bench" / "results"


def test_every_command_is_a_target_or_run_elsewhere():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    named = set(re.findall(r"make ([\w-]+)", README))
    assert {"demo", "test"} <= named <= targets
    installation = "pip install --no-build-isolation ."
    assert installation in README
    assert "pip wheel --quiet --no-build-isolation" in makefile  # the same build


def test_linked_files_exist():
    headings = re.findall(r"^#+ (.+)$", README, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        file, _, anchor = link.partition("#")
        assert (ROOT / file).exists(), link
        assert file or anchor in anchors, link


def test_linked_tests_exist():
    for name, file in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", README):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), name
