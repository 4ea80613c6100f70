"""Fine-tuning a language model to write what follows a text: tokens, loss, accuracy, measuring."""

import csv
import json
import random

import pytest
import torch
import yaml
from tiny_model import WORDS, save_tiny_language_model, write_csv
from tokenizers import processors
from torch.nn.functional import log_softmax

from eflat_ext import cli, experiment, finetune, loading, measure, objective, trained
from eflat_ext.config import FinetuneConfig
from eflat_ext.data import InputError, Texts

END = len(WORDS) + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("language_model")


@pytest.fixture(scope="module")
def settings(folder):
    """To write the neighbour of the last of two to eight words, then the same word again."""
    rng = random.Random(0)
    texts = [rng.choices(range(12), k=rng.randint(2, 8)) for _ in range(600)]
    rows = [(" ".join(WORDS[k] for k in t), f"{WORDS[t[-1] + 1]} {WORDS[t[-1]]}") for t in texts]
    return {
        "task_type": "CAUSAL_LM",
        "model": save_tiny_language_model(folder / "model"),
        "data": write_csv(folder / "data.csv", rows),
        "max_length": 32,
        "steps": 80,
        "rank": 8,
        "lr": 2e-2,
        "target_modules": ["all-linear"],
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def comparison(folder, settings):
    methods = ["lora", "eflat", "full"]
    config = FinetuneConfig(**settings, method=methods, full_lr=1e-2, output_dir=folder / "run")
    return finetune.run(config)


def tokens_of(words):
    return [WORDS.index(word) + 2 for word in words]


# --- tokens ------------------------------------------------------------------------------


def test_labels_are_the_tokens_to_be_written(settings):
    config = FinetuneConfig(**settings)
    tokenizer = loading.load_tokenizer(settings["model"], config)
    part = Texts(["word3 word4", "word5"], ["word6", "word7 word8"])
    inputs, labels = objective.encode(config, tokenizer, part)
    first, second = tokens_of(["word3", "word4", "word6"]), tokens_of(["word5", "word7", "word8"])
    assert [row["input_ids"] for row in inputs] == [[*first, END], [*second, END]]
    assert labels == [[-100, -100, first[2], END], [-100, *second[1:], END]]
    assert all(row["attention_mask"] == [1, 1, 1, 1] for row in inputs)


@pytest.mark.parametrize("max_length", [2, 3, 8, 9])
@pytest.mark.parametrize(("before", "after"), [(2, 20), (20, 2), (20, 20), (1, 1)])
def test_of_what_is_too_long_the_longer_is_cut(settings, max_length, before, after):
    config = FinetuneConfig(**{**settings, "max_length": max_length})
    tokenizer = loading.load_tokenizer(settings["model"], config)
    text, label = WORDS[:before], WORDS[40 : 40 + after]
    inputs, labels = objective.encode(config, tokenizer, Texts([" ".join(text)], [" ".join(label)]))
    row, written = inputs[0]["input_ids"], [t for t in labels[0] if t != objective.IGNORED]
    prompt = row[: len(row) - len(written)]
    whole = [*tokens_of(label), END]
    assert len(row) == min(max_length, before + len(whole)) == len(labels[0])
    assert prompt and prompt == tokens_of(text)[: len(prompt)]
    assert written and written == whole[: len(written)]
    if len(prompt) < before and len(written) < len(whole):
        assert len(written) == max_length // 2


def test_a_tokenizer_that_ends_texts_itself_does_not_end_them_twice(settings):
    config = FinetuneConfig(**settings)
    tokenizer = loading.load_tokenizer(settings["model"], config)

    ending = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", END)])
    tokenizer.backend_tokenizer.post_processor = ending
    assert tokenizer("word3")["input_ids"] == [*tokens_of(["word3"]), END]
    inputs, _ = objective.encode(config, tokenizer, Texts(["word3"], ["word6"]))
    assert inputs[0]["input_ids"] == [*tokens_of(["word3", "word6"]), END]


# --- loss and accuracy -------------------------------------------------------------------


def test_loss_and_accuracy_are_those_of_the_tokens_one_by_one(settings):
    config = FinetuneConfig(**settings)
    task = finetune.prepare(config)
    model, _ = finetune.build(config, task, "lora", 0)
    for parameter in model.parameters():  # B = 0 would leave the base model
        parameter.data += 0.05 * torch.randn_like(parameter)
    total, count, right = 0.0, 0, 0
    with torch.no_grad():
        model.eval()
        for text, label in zip(task.splits.test.texts, task.splits.test.labels, strict=True):
            seen, wanted = tokens_of(text.split()), [*tokens_of(label.split()), END]
            all_right = True
            for token in wanted:
                logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
                total -= float(log_softmax(logits, dim=0)[token])
                all_right &= int(logits.argmax()) == token
                seen = [*seen, token]
            count += len(wanted)
            right += all_right
    loss, accuracy = finetune.evaluate(config, task, model, task.held_out)
    assert loss == pytest.approx(total / count, rel=1e-5)
    assert accuracy == right / len(task.splits.test)


def test_padding_changes_no_loss(settings):
    config = FinetuneConfig(**settings)
    task = finetune.prepare(config)
    model, _ = finetune.build(config, task, "lora", 0)
    inputs, labels = finetune.collate(task, task.train, list(range(16)))
    assert not (inputs["attention_mask"].sum(1) == inputs["input_ids"].shape[1]).all()
    whole = objective.loss_of(finetune.logits_of(config, model, inputs), labels, "sum")
    single = 0.0
    for k in range(16):
        inputs, labels = finetune.collate(task, task.train, [k])
        assert objective.count(labels) == int((labels != objective.IGNORED).sum())
        logits = finetune.logits_of(config, model, inputs)
        single += objective.loss_of(logits, labels, "sum").item()
    assert whole.item() == pytest.approx(single, rel=1e-5)


# --- whole runs --------------------------------------------------------------------------


def test_it_learns_and_what_it_left_is_what_was_trained(comparison):
    for method in ("lora", "eflat", "full"):
        folder = comparison / method / "seed-0"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["loss"] < {"full": 1}.get(method, 2.5)  # at first 4.5 or more
        assert metrics["accuracy"] > {"full": 0.3}.get(method, 0)
        (run,) = trained.find([folder])
        settings = trained.MeasureConfig(part="test", examples=1000, device="cpu")
        loaded = trained.load(run, settings)
        with torch.no_grad():
            values = [float(trained.loss(loaded.model, batch)) for batch in loaded.batches]
        assert sum(values) / len(values) == pytest.approx(metrics["loss"], rel=1e-5)


def test_the_instruments_take_it(comparison):
    config = measure.SharpnessConfig(
        rho=[0.1], samples=2, examples=32, estimate=True, device="cpu", layers=["q_proj"]
    )
    rows = measure.run([comparison / "eflat"], config)
    worst, loss = ([r["value"] for r in rows if r["measure"] == m] for m in ("worst", "loss"))
    assert worst[0] > 0 and loss[0] > 0


def test_the_command_line_takes_it(settings, tmp_path, capsys):
    arguments = ["finetune", "--steps", "2", "--output-dir", str(tmp_path / "run")]
    for name in ("task_type", "model", "data", "max_length", "device"):
        arguments += [f"--{name.replace('_', '-')}", str(settings[name])]
    assert cli.main(arguments) == 0
    assert "to write the label" in " ".join(capsys.readouterr().out.split())


def test_an_experiment_of_it(settings, tmp_path):
    content = {
        "settings": {**settings, "steps": 5, "validation_size": 40, "test_size": 60},
        "tasks": {"echo": {"train_size": 24, "also_test": ["typos"]}},
        "methods": {"lora": {"tune": {"lr": [1e-3, 1e-2]}}, "eflat": {"like": "lora"}},
        "tuning": {"seeds": [100], "choose_by": "loss"},
        "seeds": [0, 1],
        "sharpness": {
            "worst_rho": 0.1,
            "random_rho": 1.0,
            "sentences": 16,
            "layers": ["q_proj", "v_proj"],
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    with experiment.run(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["ok"] * 6
    final = [row for row in rows if row["stage"] == "final"]
    assert all(float(row["sharpness_worst"]) > 0 for row in final)
    # Misspelt words are unknown here: harder than the test itself.
    assert all(float(row["loss@typos"]) != float(row["loss"]) for row in final)


# --- what goes wrong ---------------------------------------------------------------------


def test_wrong_labels_are_for_classes(settings, tmp_path, capsys):
    content = {
        "settings": settings,
        "tasks": {"echo": {"label_noise": 0.2}},
        "methods": {"lora": {}},
        "seeds": [0],
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    assert cli.main(["experiment", str(path)]) == 2
    assert "label_noise needs labels that are classes" in capsys.readouterr().err


def test_no_room_to_write_is_named(settings):
    with pytest.raises(InputError, match="--max-length is 1"):
        FinetuneConfig(**{**settings, "max_length": 1}).check()
