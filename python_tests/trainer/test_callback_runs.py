"""EFlatCallback: optimizers by name, several trainings, interrupted ones, other settings."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    assert_same_bits,
    lora_gpt2,
    same_bits,
    scale_gradients,
    trainable,
    weights,
)
from pytorch_optimizer import Lookahead
from ranks import together
from torch import nn
from trainer_case import (
    Read,
    Sentences,
    arguments,
    assert_saved,
    own,
    with_callback,
)
from transformers import Trainer, TrainerCallback

from eflat_ext import trainer as ours
from eflat_ext.trainer.callback import FILE

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT

OPTIMS = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adamw_torch_8bit": {},  # torchao
    "adafactor": {},
    "adagrad": {},
    "rmsprop": {},
    "sgd": {"learning_rate": 1.0},
    "adamw_bnb_8bit": {},
    "paged_adamw_8bit": {},
    "lion_8bit": {},
    "paged_ademamix_32bit": {},
    "schedule_free_adamw": {"lr_scheduler_type": "constant"},
    "schedule_free_sgd": {"lr_scheduler_type": "constant", "learning_rate": 1.0},
}


def around(model: nn.Module, args: Any, **options: Any) -> Any:
    """Return a trainer with EFlatLoRA around the optimizer that the arguments name."""
    made = ours.eflat_optimizer(args, rho=0.2, fused_step=False, model=model)
    data = Sentences()
    return Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=made, **options)


@pytest.mark.proves(
    "Hugging Face Trainer",
    "EFlatCallback: optimizers by name (8-bit, paged, Adafactor, schedule-free), also resumed",
)
@pytest.mark.parametrize("optim", OPTIMS)
def test_optimizers_by_name(optim: str, tmp_path: Path) -> None:
    """The trajectory of EFlatLoRA around that optimizer, not of plain LoRA, bit for bit."""
    settings = {"optim": optim, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings |= OPTIMS[optim]
    model, other, plain, resumed = (lora_gpt2() for _ in range(4))
    run, record = with_callback(model, arguments(tmp_path / "whole", **settings))
    run.train()
    around(other, arguments(tmp_path / "around", **settings)).train()
    args = arguments(tmp_path / "plain", **settings)
    Trainer(model=plain, args=args, train_dataset=Sentences()).train()
    assert_same_bits(weights(model), weights(other))
    assert all(bool(E.any() and E.isfinite().all()) for E in record.averages[4].values())
    names = [name for name, parameter in plain.named_parameters() if parameter.requires_grad]
    assert not any(same_bits(weights(model)[name], weights(plain)[name]) for name in names)
    again, _ = with_callback(resumed, arguments(tmp_path / "again", **settings))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_bits(weights(resumed), weights(model))


OWN: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Muon": lambda parameters: torch.optim.Muon(parameters, lr=1e-2),
    "Lookahead": lambda parameters: Lookahead(torch.optim.AdamW(parameters, lr=1e-2)),
    "one layer": lambda parameters: torch.optim.AdamW(parameters[:2], lr=1e-2),
}


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_of_the_users_resumes(name: str, tmp_path: Path) -> None:
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = lora_gpt2()
        args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        run, record = with_callback(model, args)
        run.optimizer = OWN[name](trainable(model))
        run.train(resume_from_checkpoint=resume)
        assert len(record.averages[4]) == (1 if name == "one layer" else 6)
        assert all(bool(E.any()) for E in record.averages[4].values())
        results.append({**weights(model), **record.averages[4]})
    assert_same_bits(*results)


class Fail(TrainerCallback):
    """Raise in the middle of a step, once."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            self.at = -1
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_second_training_goes_on_as_the_optimizer_does(interrupted: bool, tmp_path: Path) -> None:
    """Trainer keeps its optimizer with its state, so the averages are kept, as EFlatLoRA's are."""
    models = [lora_gpt2(), lora_gpt2()]
    fails = [Fail(3 if interrupted else -1) for _ in models]
    run, record = with_callback(models[0], arguments(tmp_path), callbacks=[fails[0]])
    runs = [run, around(models[1], arguments(tmp_path), callbacks=[fails[1]])]
    for one in runs:
        torch.manual_seed(0)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                one.train()
        else:
            one.train()
    if not interrupted:
        assert record.callback.perturbation is None
        reads = Read(models[0])
        models[0].train()(Sentences()[0]["input_ids"][None])
        assert_same_bits(reads.weights(models[0]), weights(models[0]))
    assert_same_bits(weights(models[0]), weights(models[1]))
    for one in runs:
        torch.manual_seed(0)
        one.train()
    assert_same_bits(weights(models[0]), weights(models[1]))
    assert_same_bits(record.averages[5], own(runs[1]).averages)
    assert own(runs[1]).perturbation.steps == (3 if interrupted else 5) + 5


def test_a_new_model_for_each_training_starts_anew(tmp_path: Path) -> None:
    """``model_init``, as in a search for hyperparameters; the model before is not kept alive."""
    made: list[Any] = []

    def model_init() -> nn.Module:
        model = lora_gpt2()
        made.append(weakref.ref(model))
        return model

    callback = ours.EFlatCallback(rho=0.2)
    run = Trainer(
        args=arguments(tmp_path),
        train_dataset=Sentences(),
        model_init=model_init,
        callbacks=[callback],
    )
    results = []
    for _ in range(2):
        run.train()
        results.append(weights(run.model))
    assert_same_bits(*results)
    run.model_wrapped = run.model
    gc.collect()
    assert [model() is None for model in made] == [True] * (len(made) - 1) + [False]


def test_a_new_optimizer_starts_anew(tmp_path: Path) -> None:
    """Averages go with the optimizer's state."""
    model = lora_gpt2()
    run, record = with_callback(model, arguments(tmp_path))
    run.train()
    run.optimizer = run.lr_scheduler = None
    other = lora_gpt2()
    other.load_state_dict(model.state_dict())
    fresh, fresh_record = with_callback(other, arguments(tmp_path))
    for one in (run, fresh):
        torch.manual_seed(0)
        one.train()
    assert_same_bits(weights(model), weights(other))
    assert_same_bits(record.averages[5], fresh_record.averages[5])


def test_the_callback_serves_one_trainer_after_another(tmp_path: Path) -> None:
    """Also where the model's former trainer was interrupted."""
    model, callback = lora_gpt2(), ours.EFlatCallback(rho=0.2)
    args, data = arguments(tmp_path), Sentences()
    first = Trainer(model, args, train_dataset=data, callbacks=[callback, Fail(2)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    former = callback.perturbation
    other, fresh = lora_gpt2(), ours.EFlatCallback(rho=0.2)
    other.load_state_dict(model.state_dict())
    for each, one in ((model, callback), (other, fresh)):
        run = Trainer(each, arguments(tmp_path), train_dataset=data, callbacks=[one])
        torch.manual_seed(0)
        run.train()
    assert former.ended
    assert_same_bits(weights(model), weights(other))


def test_copies_and_removal(tmp_path: Path) -> None:
    """A copy has the settings and no part in the run; a plain training after removal is plain."""
    copies: list[ours.EFlatCallback] = []

    class Copy(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            copies.append(copy.deepcopy(callback))
            copies.append(pickle.loads(pickle.dumps(callback)))
            for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
                twin.global_step = 77
                twin.save_to_json(str(tmp_path / "twin.json"))
                assert json.loads((tmp_path / "twin.json").read_text())["global_step"] == 77
                assert not (tmp_path / FILE).exists()

    model, other = lora_gpt2(), lora_gpt2()
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    run, record = with_callback(model, args, callbacks=[Copy()], beta=0.5, onto="A")
    callback = record.callback
    run.train()
    for one in copies:
        assert one.settings == callback.settings and one.perturbation is None
    other.load_state_dict(model.state_dict())
    run.remove_callback(ours.EFlatCallback)
    run.remove_callback(record)
    plain = Trainer(other, arguments(tmp_path), train_dataset=Sentences())
    run.optimizer = run.lr_scheduler = None
    for one in (run, plain):
        torch.manual_seed(0)
        one.train()
    assert_same_bits(weights(model), weights(other))


def test_removed_in_the_midst_of_a_run(tmp_path: Path) -> None:
    """The perturbation goes on, and is saved, until it is removed itself."""

    class Remove(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                run.remove_callback(ours.EFlatCallback)
            if state.global_step == 4:
                record.callback.perturbation.remove()

    model, other = lora_gpt2(), lora_gpt2()
    settings = {"save_strategy": "steps", "save_steps": 1}
    run, record = with_callback(model, arguments(tmp_path / "a", **settings), callbacks=[Remove()])
    whole, whole_record = with_callback(other, arguments(tmp_path / "b", **settings))
    for one in (run, whole):
        torch.manual_seed(0)
        one.train()
    assert sorted(record.weights) == [1, 3, 4, 5]  # Trainer left out the one after the removed one
    for step in (1, 3, 4):
        assert_same_bits(record.weights[step], whole_record.weights[step])
        assert (tmp_path / "a" / f"checkpoint-{step}" / FILE).exists()
    assert not same_bits(weights(model)[first_b(model)], weights(other)[first_b(model)])


def first_b(model: nn.Module) -> str:
    return next(name for name, _ in model.named_parameters() if "lora_B" in name)


@pytest.mark.proves("Hugging Face Trainer", "EFlatCallback: fp16, a skipped step changes nothing")
def test_fp16_overflows(tmp_path: Path) -> None:
    class Overflowing(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * torch.inf if self.state.global_step in (0, 3, 4) else loss

    model = lora_gpt2()
    run, record = with_callback(model, arguments(tmp_path, max_steps=7), Overflowing)
    scale_gradients(run.accelerator, init_scale=2.0**10)
    before = weights(model)
    run.train()
    assert run.accelerator.scaler.get_scale() == 2.0**7
    assert_same_bits(record.weights[1], before)
    assert not any(bool(E.any()) for E in record.averages[1].values())
    for step in (4, 5):
        assert_same_bits(record.weights[step], record.weights[3])
        assert_same_bits(record.averages[step], record.averages[3])
    for step in (2, 3, 6, 7):
        assert all(bool(E.any() and E.isfinite().all()) for E in record.averages[step].values())
        moved = record.weights[step][first_b(model)]
        assert not same_bits(moved, record.weights[step - 1][first_b(model)])


@pytest.mark.proves(
    "Hugging Face Trainer",
    "EFlatCallback: `load_best_model_at_end`, every save and evaluation clean",
)
def test_best_model_at_the_end(tmp_path: Path) -> None:
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    model = lora_gpt2()
    run, record = with_callback(model, arguments(tmp_path, **settings))
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = losses.index(max(losses)) + 1
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert_same_bits(weights(model), record.weights[best])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    assert_saved(tmp_path / f"checkpoint-{best}", record.weights[best])
    other = lora_gpt2()
    plain = Trainer(other, arguments(tmp_path), eval_dataset=Sentences())
    for step, loss in enumerate(losses, 1):
        other.load_state_dict(record.weights[step], strict=False)
        assert plain.evaluate()["eval_loss"] == loss


def test_the_file_goes_with_the_optimizers_state(tmp_path: Path) -> None:
    """None where Trainer saves none: ``save_only_model``, ``save_strategy="no"``, save_state."""
    for settings, files in (
        ({"save_strategy": "no"}, 0),
        ({"save_strategy": "steps", "save_steps": 2, "save_only_model": True}, 0),
        ({"save_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1}, 1),
    ):
        folder = tmp_path / str(files) / str(len(settings))
        run, _ = with_callback(lora_gpt2(), arguments(folder, **settings))
        run.train()
        run.save_state()
        assert len(list(folder.rglob(FILE))) == files
        assert len(list(folder.rglob("optimizer.pt"))) == files


@pytest.mark.parametrize("torn", ["replace", "save_file"])
def test_a_complete_checkpoint_has_the_file(
    torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written before ``trainer_state.json``: a run that ends within resumes from before."""
    module = sys.modules[ours.EFlatCallback.__module__]
    owner = module.os if torn == "replace" else module
    write, written = getattr(owner, torn), []

    def tear(*args: Any) -> None:
        if FILE in str(args[1]):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(args)
        write(*args)

    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    model = lora_gpt2()
    run, _ = with_callback(model, arguments(tmp_path, **settings))
    monkeypatch.setattr(owner, torn, tear)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    assert not (tmp_path / "checkpoint-3" / FILE).exists()
    checkpoint = ours.last_complete_checkpoint(tmp_path)
    assert checkpoint == str(tmp_path / "checkpoint-2")
    other, again = lora_gpt2(), lora_gpt2()
    with_callback(other, arguments(tmp_path / "other", max_steps=4))[0].train()
    with_callback(again, arguments(tmp_path, **settings))[0].train(checkpoint)
    assert_same_bits(weights(again), weights(other))
    assert (tmp_path / "checkpoint-3" / FILE).exists()


def test_out_of_memory_starts_anew_with_smaller_batches(tmp_path: Path) -> None:
    class Failing(Trainer):
        passes = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            if self.passes == 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().compute_loss(*args, **kwargs)

    args = arguments(tmp_path, auto_find_batch_size=True)
    run, record = with_callback(lora_gpt2(), args, Failing)
    run.train()
    assert run.passes == 4 + 5 * 2 and sorted(record.averages) == [1, 2, 3, 4, 5]
    assert all(bool(E.any() and E.isfinite().all()) for E in record.averages[5].values())


@pytest.mark.proves("Hugging Face Trainer", "EFlatCallback with several processes (DDP), resumed")
def test_data_parallel(tmp_path: Path) -> None:
    """Two ranks against one process with batches of twice the size; rank 0 writes the file."""
    for errors in together(2, "callback_cases:data_parallel", str(tmp_path)):
        assert max(errors) <= 1e-5
