"""EFlatCallback: the trajectory of EFlat-LoRA, checkpoints, the log, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, lora_gpt2, relative_error, same_bits, trainable, weights
from pytorch_optimizer import SAM
from safetensors.torch import load_file, save_file
from torch import nn
from trainer_case import (
    PerturbingTrainer,
    Sentences,
    arguments,
    assert_saved,
    own,
    with_callback,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from eflat_ext import EFlatPerturbation
from eflat_ext import trainer as ours
from eflat_ext.perturbation.steps import living

pytestmark = pytest.mark.filterwarnings("ignore")  # of Trainer and PEFT
FILE = "eflat_perturbation.safetensors"


@pytest.mark.proves(
    "Hugging Face Trainer",
    "EFlatCallback: the trajectory of `create_eflat_optimizer(..., fused_step=False)`, "
    "relative error at most 1e-5 after 12 steps",
)
@pytest.mark.parametrize(
    ("cls", "config"),
    [(Trainer, None), (Seq2SeqTrainer, Seq2SeqTrainingArguments)],
    ids=["Trainer", "Seq2SeqTrainer"],
)
def test_callback_equals_the_optimizer(cls: type, config: Any, tmp_path: Path) -> None:
    """Accumulation, clipping, a schedule of the learning rate, weight decay; plain LoRA differs."""
    models = [lora_gpt2() for _ in range(3)]
    kinds = () if config is None else (config,)
    args = [arguments(tmp_path, *kinds, max_steps=12, max_grad_norm=0.05) for _ in models]
    run, record = with_callback(models[0], args[0], cls)
    run.train()
    around, plain = (
        cls(model=model, args=given, train_dataset=Sentences())
        for model, given in zip(models[1:], args[1:], strict=True)
    )
    around.optimizer_cls_and_kwargs = ours.eflat_optimizer(
        args[1], rho=0.2, fused_step=False, model=models[1]
    )
    around.train()
    plain.train()
    assert relative_error(models[0], models[1]) <= 1e-5
    assert relative_error(models[0], models[2]) > 1e-3
    assert type(own(run)) is torch.optim.AdamW
    assert len(record.averages) == 12
    assert all(bool(E.any() and E.isfinite().all()) for E in record.averages[12].values())


class SameType(Trainer):
    """Load bf16 factors as bf16; PEFT, as Trainer calls it, casts them to float32."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        options = {"is_trainable": True, "autocast_adapter_dtype": False}
        self.model.load_adapter(resume_from_checkpoint, "default", **options)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "onto A": {"onto": "A", "norm_scope": "global"},
    "onto both": {"onto": "both", "beta": 0.5, "rtol": 1e-3},
    "schedule": {"rho": lambda step: 0.3 / (1 + step)},
}


@pytest.mark.proves(
    "Hugging Face Trainer",
    "EFlatCallback: resumes bit-exact, also from a checkpoint that was moved, and with bf16 LoRA",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_resumes(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    settings = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 6,
        "logging_steps": 1,
        "max_grad_norm": 0.05,
        "gradient_accumulation_steps": 1,
    }
    model = lora_gpt2().to(dtype)
    args = arguments(tmp_path / "whole", **settings)
    run, record = with_callback(model, args, SameType, **options)
    run.train()
    saved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "whole" / "checkpoint-6", saved)
    assert not list(saved.glob("*.tmp"))
    assert_saved(saved, record.weights[6])
    in_file = sorted(load_file(saved / FILE).values(), key=lambda E: float(E.norm()))
    averages = sorted(record.averages[6].values(), key=lambda E: float(E.norm()))
    assert len(averages) == (12 if options.get("onto") == "both" else 6)
    assert all(same_bits(*both) for both in zip(in_file, averages, strict=True))
    groups = torch.load(saved / "optimizer.pt", weights_only=True)["param_groups"]
    assert not any("perturbation" in name for name in groups[0])
    resumed = lora_gpt2().to(dtype)
    args = arguments(tmp_path / "again", **settings)
    again, after = with_callback(resumed, args, SameType, **options)
    again.train(resume_from_checkpoint=str(saved))
    assert sorted(after.averages) == list(range(7, 13))
    for step in after.averages:
        assert_same_bits(after.averages[step], record.averages[step])
    assert_same_bits(weights(resumed), weights(model))


def test_a_checkpoint_without_averages_is_told(tmp_path: Path) -> None:
    """Of a plain run, or with the file lost: zeros, and a warning that names file and folder."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    run, record = with_callback(lora_gpt2(), arguments(tmp_path, **settings))
    run.train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / FILE).unlink()
    again, after = with_callback(lora_gpt2(), arguments(tmp_path / "again", **settings))
    with pytest.warns(UserWarning, match=rf"{checkpoint} has no {FILE}.*start at zero"):
        again.train(resume_from_checkpoint=str(checkpoint))
    assert sorted(after.averages) == [3, 4]
    assert all(bool(E.any()) for E in after.averages[3].values())
    assert not any(same_bits(E, record.averages[3][n]) for n, E in after.averages[3].items())


def test_averages_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Other onto, other layers, no such file: an error with its path, and no perturbation."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    with_callback(lora_gpt2(), arguments(tmp_path, **settings))[0].train()
    checkpoint = str(tmp_path / "checkpoint-2")
    path = tmp_path / "checkpoint-2" / FILE

    def resume(match: str, **options: Any) -> None:
        model = lora_gpt2()
        run, record = with_callback(model, arguments(tmp_path / "again", **settings), **options)
        with pytest.raises(ValueError, match=match) as caught:
            run.train(resume_from_checkpoint=checkpoint)
        assert caught.tb is not None  # and what its frames hold is alive
        assert record.callback.perturbation is None and not record.averages
        factors = {id(parameter) for parameter in model.parameters()}
        assert not any(one.parameter_ids() & factors for one in living)

    resume(rf"{FILE}: state_dict must have .* perhaps by another onto", onto="A")
    whole = load_file(path)
    counters = {"steps": "2", "skipped": "0"}
    save_file(dict(list(whole.items())[1:]), path, counters)
    resume(rf"{FILE}: state_dict must have .* other layers")
    save_file(whole, path)
    resume(rf"{FILE} must be a file that EFlatCallback wrote")
    path.write_bytes(b"torn")
    resume(rf"{FILE} must be a file that EFlatCallback wrote")


@pytest.mark.proves("Hugging Face Trainer", "EFlatCallback: the log has norm and skipped counts")
@pytest.mark.parametrize("mixin", [False, True])
def test_log(mixin: bool, tmp_path: Path) -> None:
    """In the history, and for callbacks that come before it, as those of ``report_to`` do."""
    seen: list[dict[str, Any]] = []
    norms: list[float] = []

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            seen.append(dict(logs))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:  # counts as skipped
                pair = record.callback.perturbation.pairs[0]
                pair.A.grad.zero_()
                pair.B.grad.zero_()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            values = record.callback.perturbation.norms.values()
            norms.append(float(torch.stack(list(values)).mean()))

    args = arguments(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=1)
    cls = PerturbingTrainer if mixin else Trainer
    run, record = with_callback(lora_gpt2(), args, cls, [Report()])
    run.train()
    for entries in (seen, run.state.log_history):
        logged = [entry for entry in entries if "loss" in entry]
        assert [entry["perturbation_norm"] for entry in logged] == [norms[1], norms[3]]
        assert [entry["skipped_perturbations"] for entry in logged] == [0, 1]
        others = [entry for entry in entries if "loss" not in entry]
        assert len(others) == 6 and not any("perturbation_norm" in entry for entry in others)


class Two(ours.EFlatCallback):
    pass


def test_wrong_uses_are_named(tmp_path: Path) -> None:
    """Clear errors, when it is made or when training begins; the weights stay as they were."""
    for wrong in (
        {"rho": -1.0},
        {"beta": 0.0},
        {"onto": "C"},
        {"norm_scope": "all"},
        {"rtol": 2.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
            ours.EFlatCallback(**wrong)
    with pytest.raises(ValueError, match="rho must"):
        ours.EFlatCallback(rho=lambda step: -1.0)

    def refused(
        match: str,
        model: nn.Module | None = None,
        error: type[Exception] = ValueError,
        **options: Any,
    ) -> None:
        model = model or lora_gpt2()
        before = weights(model)
        options = {"callbacks": [ours.EFlatCallback()], **options}
        args = arguments(tmp_path)
        run = Trainer(model=model, args=args, train_dataset=Sentences(), **options)
        with pytest.raises(error, match=match):
            run.train()
        assert_same_bits(weights(model), before)

    def optimizers(model: nn.Module, attach: bool, **options: Any) -> Any:
        base = torch.optim.SGD(trainable(model), lr=0.1, **options)
        if attach:
            EFlatPerturbation(model).attach(base)
        return base, None

    base = lora_gpt2().unload()
    refused("model must be a PEFT model with LoRA layers", base.requires_grad_(True))
    for second in (ours.EFlatCallback(), Two()):
        refused("one EFlatCallback at most, got 2", callbacks=[ours.EFlatCallback(), second])
    for hook in (ours.eflat_optimizer, ours.flat_optimizer):
        model = lora_gpt2()
        made = hook(torch.optim.SGD, lr=0.1, model=model)
        refused(
            "must have a plain optimizer, got (EFlat|Flat)LoRA",
            model,
            optimizer_cls_and_kwargs=made,
        )
    model = lora_gpt2()
    refused("got one with an attached perturbation", model, optimizers=optimizers(model, True))
    model = lora_gpt2()
    refused("optimizer must minimise", model, optimizers=optimizers(model, False, maximize=True))
    for cls, reason in ((torch.optim.LBFGS, "needs no closure"), (SAM, "one gradient per step")):
        model = lora_gpt2()
        base = cls(trainable(model), **({"base_optimizer": torch.optim.SGD} if cls is SAM else {}))
        refused(reason, model, optimizers=(base, None), error=TypeError)
    with pytest.raises(RuntimeError, match=r"callback of a transformers\.Trainer that trains"):
        ours.EFlatCallback().on_train_begin(None, None, None)
