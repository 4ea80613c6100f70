"""What lab.finetune promises: equal terms, repeatable runs, clean and loadable results."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch
from finetune_case import METHODS, figures, make_settings, one_run
from tiny_model import make_rows, write_csv

from eflat_ext.lab.data.texts import InputError, Texts
from eflat_ext.lab.experiment import plan, runner
from eflat_ext.lab.finetune import comparison, loading
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lab.measure import sharpness_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def settings(folder):
    return make_settings(folder)


# --- pairs of texts ----------------------------------------------------------------------


def test_a_pair_is_one_input_and_what_is_too_long_is_cut_from_the_longer_text(settings):
    long, short = " ".join(f"word{k}" for k in range(40)), "word50 word51"
    tokenizer = loading.load_tokenizer(settings["model"], FinetuneConfig(**settings))
    for texts in ((long, short), (short, long)):
        pair = Texts([texts[0]], [0], [texts[1]])
        (whole,) = loading.encode(tokenizer, pair, 64)
        (cut,) = loading.encode(tokenizer, pair, 12)
        words = [tokenizer.decode(row["input_ids"]).split() for row in (whole, cut)]
        assert words[0] == " ".join(texts).split()
        kept = [" ".join(long.split()[:10]) if text is long else text for text in texts]
        assert words[1] == " ".join(kept).split()


def test_the_texts_of_a_pair_are_told_apart(settings, monkeypatch):
    config = FinetuneConfig()
    tokenizer = loading.load_tokenizer(loading.find_model(config.model), config)
    pair = Texts(["is it so?"], [0], ["It is."])
    (row,) = loading.encode(tokenizer, pair, 64)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] is it so? [SEP] it is. [SEP]"
    assert row["token_type_ids"] == [0] * 6 + [1] * 4
    # One without a token for it gets a line break.
    plain = loading.load_tokenizer(settings["model"], FinetuneConfig(**settings))
    seen = []
    monkeypatch.setattr(
        type(plain), "__call__", lambda self, *texts, **options: seen.append(texts) or {}
    )
    loading.encode(plain, pair, 64)
    assert seen == [(["is it so?"], ["\nIt is."])]


def test_a_packaged_model_leaves_the_hub_within_reach(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert Path(loading.find_model("minilm")).is_absolute()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_task_on_pairs_from_training_to_measuring(settings, tmp_path):
    rows = [(*text.split(" ", 1), label) for text, label in make_rows(300)]
    data = write_csv(tmp_path / "data.csv", rows, ("premise", "hypothesis", "label"))
    columns = {"text_column": "premise", "text_pair_column": "hypothesis"}
    config = FinetuneConfig(**{**settings, "data": data}, **columns, output_dir=tmp_path / "run")
    task = comparison.prepare(config)
    pairs = dict(zip(task.splits.train.texts, task.splits.train.pairs, strict=True))
    assert len(set(task.text_keys())) == len(task.text_keys()) > len(pairs)
    misspelt = runner._further_test(config, task, plan.TYPOS)
    assert len(misspelt.pairs) == len(task.splits.test)
    with pytest.raises(InputError, match=r"data.csv has no text that the task lacks"):
        runner._further_test(config, task, data)
    with pytest.raises(InputError, match=r"holds single texts, but the task pairs of texts"):
        runner._further_test(config, task, "amazon-reviews")
    folder = comparison.run(config) / "lora" / "seed-0"
    metrics = json.loads((folder / "metrics.json").read_text())
    # Measured on the same texts, the loss is the same.
    sharpness = sharpness_table.SharpnessConfig(rho=[0.1], samples=0, examples=10**6, part="test")
    rows = sharpness_table.run([folder], dataclasses.replace(sharpness, device="cpu"))
    (loss,) = [row["value"] for row in rows if row["measure"] == "loss"]
    assert loss == pytest.approx(metrics["loss"], rel=1e-5)


# --- training ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_bit_for_bit(settings, method):
    config = FinetuneConfig(**settings)
    first, model, _ = one_run(config, method, seed=3)
    second, again, _ = one_run(config, method, seed=3)
    assert first.losses == second.losses
    assert figures(first.metrics) == figures(second.metrics)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_seed_is_another_run(settings):
    config = FinetuneConfig(**settings)
    assert one_run(config, seed=0)[0].losses != one_run(config, seed=1)[0].losses


def test_methods_start_from_the_same_weights_and_batches(settings):
    config = FinetuneConfig(**settings)
    task = comparison.prepare(config)
    plain, _ = comparison.build(config, task, "lora", 5)
    state = plain.state_dict()
    for method in ("eflat", "flat", "lora-sam"):
        other = comparison.build(config, task, method, 5)[0].state_dict()
        assert other.keys() == state.keys()
        assert all(torch.equal(other[name], state[name]) for name in state)
    # B is zero and nothing is averaged yet, so the first loss is the same for all.
    first = {method: one_run(config, method)[0].losses[0] for method in METHODS}
    assert len(set(first.values())) == 1, first


def test_radius_zero_is_plain_lora(settings):
    config = FinetuneConfig(**settings, rho=0.0)
    plain = one_run(config, "lora")[0]
    # To rounding: AdamW is computed by another operator.
    assert one_run(config, "eflat")[0].losses == pytest.approx(plain.losses, rel=1e-5)


def test_training_learns_the_task(settings):
    config = FinetuneConfig(**{**settings, "steps": 300}, target_modules=["all-linear"])
    for method in ("lora", "eflat"):
        result, _, _ = one_run(config, method)
        assert result.metrics["accuracy"] > 0.75
        assert result.metrics["train_loss"] < 0.4


def test_evaluation_is_of_clean_weights_in_eval_mode(settings):
    config = FinetuneConfig(**settings, rho=0.5)
    result, model, task = one_run(config, "eflat")
    assert not model.training
    loss, accuracy = 0.0, 0
    with torch.no_grad():
        for row, label in zip(task.held_out.inputs, task.held_out.labels, strict=True):
            logits = model(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0]
            loss -= float(logits.log_softmax(-1)[label]) / len(task.held_out)
            accuracy += int(logits.argmax()) == label
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert result.metrics["accuracy"] == accuracy / len(task.held_out)


def test_every_sentence_is_seen_once_an_epoch(settings):
    config = FinetuneConfig(**{**settings, "steps": None}, epochs=2, batch_size=7)
    task = comparison.prepare(config)
    assert task.steps == round(2 * len(task.train) / 7)
    batches = comparison.shuffled_batches(task, 7, seed=0)
    per_epoch = math.ceil(len(task.train) / 7)
    epochs = []
    for _ in range(2):
        rows = [row for _ in range(per_epoch) for row in rows_of(next(batches))]
        tokens = [tuple(row["input_ids"]) for row in task.train.inputs]
        expected = list(zip(tokens, task.train.labels, strict=True))
        assert sorted(rows) == sorted(expected)
        epochs.append(rows)
    assert epochs[0] != epochs[1]


def rows_of(batch):
    inputs, labels = batch
    columns = (inputs["input_ids"], inputs["attention_mask"], labels)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(tuple(ids[: sum(mask)]), label) for ids, mask, label in rows]


def test_the_learning_rate_rises_then_falls_to_zero(settings):
    rate = comparison.warmup_then_linear(FinetuneConfig(warmup=0.2), 50)
    rates = [rate(step) for step in range(51)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[50] == 0.0 and rates[30] == pytest.approx(0.5)
    assert comparison.warmup_then_linear(FinetuneConfig(warmup=0.0), 1)(0) == 1.0


def test_bfloat16_keeps_trained_weights_in_float32(settings):
    config = FinetuneConfig(**settings, dtype="bfloat16")
    for method in ("eflat", "full"):
        result, model, _ = one_run(config, method)
        kinds = {p.requires_grad: p.dtype for p in model.parameters()}
        assert kinds[True] == torch.float32
        assert kinds.get(False, torch.bfloat16) == torch.bfloat16
        assert math.isfinite(result.metrics["loss"])


def test_more_than_two_classes_and_a_test_set_of_its_own(tmp_path, settings):
    train, test = make_rows(300, classes=3), make_rows(80, classes=3, seed=9)
    paths = [write_csv(tmp_path / f"{k}.csv", rows) for k, rows in enumerate((train, test))]
    given = {**settings, "data": paths[0], "test_data": paths[1]}
    _, model, task = one_run(FinetuneConfig(**given))
    assert len(task.held_out) == 80
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert model.config.num_labels == 3
    task = comparison.prepare(FinetuneConfig(**given, evaluate_on="validation"))
    assert task.held_out.labels == task.splits.validation.labels


def test_settings_out_of_range_are_named():
    wrong = {
        "method": [],
        "seeds": [1, 1],
        "alpha": 0,
        "lora_dropout": 1.0,
        "rho": -0.1,
        "beta": 0.0,
        "rtol": 0.0,
        "lr": math.nan,
        "full_lr": 0.0,
        "weight_decay": -1.0,
        "warmup": 1.0,
        "max_grad_norm": -1.0,
        "batch_size": 0,
        "epochs": 0.0,
        "steps": 0,
        "train_size": 0,
        "validation_size": -1,
        "test_size": 0,
        "max_length": 0,
        "target_modules": [],
    }
    for name, value in wrong.items():
        with pytest.raises(InputError, match="--" + name.replace("_", "-")):
            FinetuneConfig(**{name: value}).check()
    with pytest.raises(InputError, match="--data-seed must be at least 0, got -1"):
        FinetuneConfig(data_seed=-1).check()
    FinetuneConfig().check()


def test_a_column_is_used_once():
    for columns in (
        {"text_column": "label"},
        {"label_column": "text"},
        {"text_pair_column": "label"},
        {"text_pair_column": "text"},
        {"image_column": "text", "task_type": "CAUSAL_LM"},
    ):
        with pytest.raises(
            InputError, match=r"-column and --.*-column must be .* got '(text|label)' for both"
        ):
            FinetuneConfig(**columns).check()
    FinetuneConfig(text_column="label", label_column="text").check()


# --- the run folder ----------------------------------------------------------------------
