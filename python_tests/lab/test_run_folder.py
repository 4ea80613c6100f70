"""What a fine-tune leaves: a complete folder, loadable results, the summary of its runs."""

import csv
import json
import math
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from finetune_case import METHODS, make_settings
from tiny_model import make_rows, save_tiny_language_model, write_csv

from eflat_ext.lab.finetune import comparison, run_folder
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lab.finetune.means import summarize

PAGE = Path(__file__).parents[2] / "docs" / "finetune.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def settings(folder):
    return make_settings(folder)


@pytest.fixture(scope="module")
def finished(folder, settings):
    """A run folder of all methods with two seeds."""
    config = FinetuneConfig(
        **settings, method=METHODS, seeds=[0, 1], output_dir=folder / "comparison"
    )
    return comparison.run(config)


def test_the_run_folder_is_complete(finished):
    top = {path.name for path in finished.iterdir()}
    assert top == {"config.yaml", "results.json", "results.csv", "loss.png", *METHODS}
    results = json.loads((finished / "results.json").read_text())
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        (method, seed) for method in METHODS for seed in (0, 1)
    ]
    for run in results["runs"]:
        folder = finished / run["method"] / f"seed-{run['seed']}"
        assert json.loads((folder / "metrics.json").read_text()) == run
        with (folder / "loss.csv").open() as file:
            losses = list(csv.DictReader(file))
        assert [int(row["step"]) for row in losses] == list(range(1, 26))
        assert all(math.isfinite(float(row["loss"])) for row in losses)
    with (finished / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [run["loss"] for run in results["runs"]]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_saved_runs_load_and_give_the_reported_figures(finished, settings):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification as Classifier

    config = FinetuneConfig(**settings)
    task = comparison.prepare(config)
    for method in METHODS:
        folder = finished / method / "seed-1"
        if method == "full":
            model = Classifier.from_pretrained(folder)
        else:
            base = Classifier.from_pretrained(settings["model"], num_labels=2)
            model = PeftModel.from_pretrained(base, folder)
        loss, accuracy = comparison.evaluate(config, task, model, task.held_out)
        reported = json.loads((folder / "metrics.json").read_text())
        assert (loss, accuracy) == (reported["loss"], reported["accuracy"])


@pytest.mark.parametrize("method", ["eflat", "full"])
def test_a_run_of_three_classes_is_used_as_its_page_says(settings, tmp_path, monkeypatch, method):
    colours = ["red", "green", "blå"]
    rows = [(text, colours[int(label)]) for text, label in make_rows(300, classes=3)]
    write_csv(tmp_path / "data.csv", rows)
    monkeypatch.chdir(Path(settings["model"]).parent)  # to a relative path of the model
    given = {**settings, "model": "model", "data": str(tmp_path / "data.csv"), "method": [method]}
    config = FinetuneConfig(**given, output_dir=tmp_path / "run")
    folder = comparison.run(config) / method / "seed-0"
    test = comparison.prepare(config).splits.test
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    block = block.replace("runs/mine/eflat/seed-0", str(folder))
    if method == "full":
        block = block.replace("AutoPeftModelFor", "AutoModelFor")
    names = {"json": json, "Path": Path, "texts": test.texts} | vars(transformers) | vars(peft)
    with torch.no_grad():
        exec(block, names)
    classes = names["classes"]
    assert sorted(classes) == sorted(colours)
    right = sum(p == classes[k] for p, k in zip(names["predicted"], test.labels, strict=True))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert right / len(test) == metrics["accuracy"]


def test_a_language_model_s_adapter_is_loaded_by_either_library(tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = FinetuneConfig(
        model=save_tiny_language_model(tmp_path / "model"),
        data=write_csv(tmp_path / "data.csv", make_rows(60)),
        task_type="CAUSAL_LM",
        max_length=32,
        steps=2,
        device="cpu",
        method=["lora"],
        output_dir=tmp_path / "run",
    )
    folder = comparison.run(config) / "lora" / "seed-0"
    assert not (folder / "classes.json").exists()
    inputs = AutoTokenizer.from_pretrained(folder)(["word1 word2"], return_tensors="pt")
    logits = [
        auto.from_pretrained(folder)(**inputs).logits
        for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM)
    ]
    assert torch.allclose(*logits, atol=1e-5)


def test_rows_that_are_left_out_are_shown(settings, tmp_path, capsys):
    rows = [*make_rows(60), ("word1 word2", "0"), ("word1 word2", "1")]
    given = {**settings, "data": write_csv(tmp_path / "[bold]d.csv", rows), "steps": 1}
    comparison.run(FinetuneConfig(**given, method=["lora"], output_dir=tmp_path / "[bold]run"))
    shown = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    assert "rowsleftoutforthetextofanearlierrow:1;ofthesewithanotherlabel" in shown
    assert "'word1word2'with'0'and'1'" in shown
    assert "[bold]d.csv" in shown and "[bold]run/" in shown


def test_the_summary_is_mean_and_standard_error():
    runs = [
        {
            "method": "lora",
            "accuracy": accuracy,
            "loss": 0.5,
            "train_loss": 0.4,
            "seconds_per_step": seconds,
        }
        for accuracy, seconds in ((0.7, 1.0), (0.8, 9.0), (0.9, 2.0))
    ]
    (row,) = summarize(runs)
    assert row["accuracy"] == pytest.approx(0.8)
    assert row["accuracy_standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert row["loss_standard_error"] == 0.0
    assert row["seconds_per_step"] == 2.0
    assert "accuracy_standard_error" not in summarize(runs[:1])[0]


def test_a_run_that_diverges_leaves_all_files_and_is_marked(settings, tmp_path, capsys):
    given = {**settings, "rho": 1e30, "method": ["lora", "eflat"], "seeds": [0, 1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        folder = comparison.run(FinetuneConfig(**given, output_dir=tmp_path / "run"))
    assert {"results.json", "results.csv", "loss.png"} < {path.name for path in folder.iterdir()}
    plain, ours = json.loads((folder / "results.json").read_text())["summary"]
    assert "diverged" not in plain and math.isfinite(plain["loss_standard_error"])
    assert (ours["seeds"], ours["diverged"]) == (2, 2)
    assert ours["loss"] is None and ours["loss_standard_error"] is None
    shown = capsys.readouterr().out
    assert "EFlat-LoRA (2 of 2 diverged)" in shown and "not finite" in shown
    assert f"run folder: {folder}" in shown


def test_one_diverged_seed_of_two_is_no_mean_of_the_other():
    common = {"method": "lora", "accuracy": 0.5, "train_loss": 0.4, "seconds_per_step": 1.0}
    for loss in (math.nan, math.inf):
        (row,) = summarize([{**common, "loss": 0.5}, {**common, "loss": loss}])
        assert row["diverged"] == 1
        assert math.isnan(row["loss"]) and math.isnan(row["loss_standard_error"])
        assert row["train_loss"] == 0.4 and row["train_loss_standard_error"] == 0.0


def test_json_knows_no_infinity(tmp_path):
    run_folder._write_json(tmp_path / "x.json", {"a": [math.nan, 1.0], "b": -math.inf})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0], "b": None}


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run_folder.free_folder(None)
    first.mkdir(parents=True)
    assert run_folder.free_folder(None) != first
