"""Hugging Face Trainer: the hook for its optimizer, clean saves, resuming, the best model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, lora_bert, lora_gpt2, same_bits, trainable, weights
from torch import nn
from trainer_case import RUNS, Read, Sentences, adapter, arguments, assert_saved, make, own
from transformers import Trainer, TrainerCallback

from eflat_ext import EFlatLoRA, EFlatPerturbation, FlatLoRA, LoRASAM, create_eflat_optimizer
from eflat_ext import trainer as ours

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT


class Watch(TrainerCallback):
    """Compare what is saved, between micro-batches too, with the weights after the last step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Any = None
        self.saves = 0
        self.perturbed = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.clean = weights(model)
        self.read = Read(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.clean = weights(model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        read = self.read.weights(model)
        self.perturbed += any(not same_bits(read[name], self.clean[name]) for name in read)
        self.run.save_model(str(self.folder / "between"))
        assert_saved(self.folder / "between", self.clean)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saves += 1
        assert_saved(self.folder / f"checkpoint-{state.global_step}", self.clean)


@pytest.mark.proves(
    "Hugging Face Trainer",
    "saves clean weights at any step, resumes bit-exact (accumulation, clipping, label smoothing)",
)
@pytest.mark.parametrize(("build", "evaluate"), [(lora_gpt2, True), (lora_bert, False)])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_every_save_is_clean_and_resumes(
    options: dict[str, Any], build: Callable, evaluate: bool, tmp_path: Path
) -> None:
    """Accumulation, clipping, label smoothing, dropout; saved at every step."""
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_grad_norm": 0.05,
        "label_smoothing_factor": 0.1,
        **({"eval_strategy": "steps", "eval_steps": 2} if evaluate else {}),
    }
    whole = build(lora_bias=True)
    watch = Watch(tmp_path)
    run = make(whole, arguments(tmp_path, **settings), callbacks=[watch], **options)
    watch.run = run
    run.train()
    assert watch.saves == 5
    # The average is 0 at the first step; for A at the second, too, since B was 0 at the first.
    first = 2 if "onto" in options else 1
    assert watch.perturbed == (5 - first if isinstance(own(run), EFlatLoRA) else 0)
    for step in (1, 4) if evaluate else (3,):
        resumed = build(lora_bias=True)
        again = make(resumed, arguments(tmp_path / "again", **settings), **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_bits(weights(resumed), weights(whole))
        assert_same_bits(getattr(own(again), "averages", {}), getattr(own(run), "averages", {}))


@pytest.mark.proves(
    "Hugging Face Trainer", "one line: optimizer, numbers and groups are those of the arguments"
)
def test_hook_equals_wrapping_the_optimizer_of_trainer(tmp_path: Path) -> None:
    """The arguments' optimizer, numbers and groups, bit for bit."""
    model, other = lora_gpt2(lora_bias=True), lora_gpt2(lora_bias=True)
    run = make(model, arguments(tmp_path))
    run.train()
    around = Trainer(model=other, args=arguments(tmp_path), train_dataset=Sentences())
    around.optimizer = EFlatLoRA(other, around.create_optimizer(), rho=0.2)
    around.train()
    groups = own(around).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(g["params"]) for g in own(run).param_groups] == [len(g["params"]) for g in groups]
    assert type(own(run).base) is type(own(around).base)
    assert_same_bits(weights(model), weights(other))
    assert all(bool(average.any()) for average in own(run).averages.values())


def test_numbers_of_the_hook_precede_those_of_the_arguments(tmp_path: Path) -> None:
    cases = [
        (torch.optim.AdamW, {"lr": 0.3}, (0.3, 0.01, 0.9)),
        (torch.optim.AdamW, {"lr": 0.3, "weight_decay": 0.7}, (0.3, 0.7, 0.9)),
        (arguments(tmp_path), {}, (1e-2, 0.1, 0.8)),
        (arguments(tmp_path), {"lr": 0.3, "weight_decay": 0.7}, (0.3, 0.7, 0.8)),
    ]
    for base, options, (lr, decay, beta1) in cases:
        model = lora_gpt2(lora_bias=True)
        factory, kwargs = ours.eflat_optimizer(base, rho=0.3, beta=0.5, **options)
        optimizer = factory()(model, **kwargs)
        assert (optimizer.rho, optimizer.beta) == (0.3, 0.5)
        decayed, others = optimizer.param_groups
        assert (decayed["lr"], others["lr"]) == (lr, lr)
        assert (decayed["weight_decay"], others["weight_decay"]) == (decay, 0.0)
        assert decayed["betas"][0] == beta1
        biases = {id(p) for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
        assert biases and {id(p) for p in others["params"]} == biases
        assert len(decayed["params"]) + len(biases) == len(trainable(model))


@pytest.mark.parametrize(
    ("hook", "cls"),
    [
        (ours.eflat_optimizer, EFlatLoRA),
        (ours.flat_optimizer, FlatLoRA),
        (ours.lora_sam_optimizer, LoRASAM),
    ],
)
def test_the_hook_takes_groups_from_transformers_4(hook: Callable, cls: type) -> None:
    model = lora_gpt2()
    groups = [{"params": trainable(model)}]
    factory, kwargs = hook(torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="pass model="):
        factory(groups, **kwargs)
    factory, kwargs = hook(torch.optim.SGD, lr=0.1, model=model)
    assert type(factory(groups, **kwargs)) is cls


@pytest.mark.proves("Hugging Face Trainer", "an optimizer that exists already goes in as usual")
def test_hook_equals_passing_the_optimizer(tmp_path: Path) -> None:
    model, other = lora_gpt2(), lora_gpt2()
    adamw = {"lr": 1e-2, "weight_decay": 0.1}
    factory, kwargs = ours.eflat_optimizer(torch.optim.AdamW, rho=0.2, **adamw)
    optimizers = (
        factory()(model, **kwargs),
        create_eflat_optimizer(other, torch.optim.AdamW, rho=0.2, **adamw),
    )
    for each, optimizer in zip((model, other), optimizers, strict=True):
        data, args = Sentences(), arguments(tmp_path)
        Trainer(each, args, train_dataset=data, optimizers=(optimizer, None)).train()
    assert_same_bits(weights(model), weights(other))


def test_wrong_arguments_of_the_hook_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base in (lora_gpt2(), "adamw", nn.Linear, None):
        with pytest.raises(TypeError, match="base must be a subclass of torch"):
            ours.eflat_optimizer(base)
    with pytest.raises(ValueError, match="rho must"):
        make(lora_gpt2(), arguments(tmp_path), rho=-1.0).train()
    args = arguments(tmp_path, optim="sgd")
    factory, _ = ours.eflat_optimizer(args)
    assert isinstance(factory()(lora_gpt2()).base, torch.optim.SGD)
    for special in ((lambda: None, {}), (torch.optim.SGD, {"params": []})):
        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_, s=special: s)
        with pytest.raises(ValueError, match=r"got optim=.*SGD"):
            factory()(lora_gpt2())


def test_a_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "eflat_ext.trainer")
    with pytest.raises(ImportError, match="pip install transformers"):
        importlib.import_module("eflat_ext.trainer")


@pytest.mark.proves(
    "Hugging Face Trainer", "`load_best_model_at_end`: evaluated, saved and loaded clean"
)
@pytest.mark.parametrize("highest", [True, False])
@pytest.mark.parametrize("hook", [ours.eflat_optimizer, ours.flat_optimizer])
def test_best_model_at_the_end(hook: Callable, highest: bool, tmp_path: Path) -> None:
    """Every evaluation gives the loss of the checkpoint's adapter, at clean weights."""
    from peft import set_peft_model_state_dict

    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": highest,
    }
    model = lora_gpt2()
    run = make(model, arguments(tmp_path, **settings), hook)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = losses.index((max if highest else min)(losses)) + 1
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert_saved(tmp_path / f"checkpoint-{best}", weights(model))
    assert len(set(losses)) == 5
    other = lora_gpt2()
    plain = Trainer(model=other, args=arguments(tmp_path), eval_dataset=Sentences())
    for step, loss in enumerate(losses, 1):
        set_peft_model_state_dict(other, adapter(tmp_path / f"checkpoint-{step}"))
        assert plain.evaluate()["eval_loss"] == loss
    model.train()  # and may train on
    losses = []
    for context in (nullcontext(), own(run).clean()):
        torch.manual_seed(0)
        with context:
            losses.append(model(**{n: v[None] for n, v in Sentences()[0].items()}).loss)
    assert (losses[0] != losses[1]) == (hook is ours.eflat_optimizer)


@pytest.mark.proves("Hugging Face Trainer", "an optimizer that is attached to, saved and resumed")
def test_an_attached_optimizer_resumes_as_eflat_lora(tmp_path: Path) -> None:
    """Trainer sees a plain AdamW only."""

    def run_of(model: nn.Module, folder: Path, attached: bool) -> Trainer:
        base = torch.optim.AdamW(trainable(model), lr=1e-2)
        if attached:
            EFlatPerturbation(model, rho=0.2).attach(base)
            optimizer: torch.optim.Optimizer = base
        else:
            optimizer = EFlatLoRA(model, base, rho=0.2, fused_step=False)
        args = arguments(folder, save_strategy="steps", save_steps=2)
        data = Sentences()
        return Trainer(model=model, args=args, train_dataset=data, optimizers=(optimizer, None))

    model, other, resumed = lora_gpt2(), lora_gpt2(), lora_gpt2()
    run_of(model, tmp_path / "attached", True).train()
    run_of(other, tmp_path / "whole", False).train()
    assert_same_bits(weights(model), weights(other))
    again = run_of(resumed, tmp_path / "again", True)
    again.train(resume_from_checkpoint=str(tmp_path / "attached" / "checkpoint-4"))
    assert_same_bits(weights(resumed), weights(model))


def test_two_trainers_of_one_model_and_a_plain_one_after_them(tmp_path: Path) -> None:
    """The second takes over; a trainer without eflat trains plainly, with a warning."""
    model = lora_gpt2()
    first = make(model, arguments(tmp_path))
    first.train()
    second = make(model, arguments(tmp_path))
    second.train()
    with pytest.raises(RuntimeError, match="a newer perturbation"):
        own(first).step()
    before = weights(model)
    plain = Trainer(model=model, args=arguments(tmp_path), train_dataset=Sentences())
    with pytest.warns(UserWarning, match="AdamW stepped weights that it perturbs"):
        plain.train()
    assert own(second).perturbation.ended
    names = [name for name in before if "lora_B" in name]
    assert names and all(not same_bits(weights(model)[name], before[name]) for name in names)
