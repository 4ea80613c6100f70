"""Functions that the tests of DeepSpeed through accelerate and Trainer run on each rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin
from deepspeed_cases import (
    ADAMW,
    OPTIONS,
    attach,
    case,
    config_of,
    engine_of,
    model_of,
    step,
    weights,
)
from models import assert_same_bits, batches, lora_bert, loss_of, trainable, without_dropout
from sharded_cases import own_part, relative_errors
from trainer_case import Sentences, arguments
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from eflat_ext import EFlatPerturbation
from eflat_ext.trainer import EFlatCallback


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a case run without the state of earlier accelerators, and leave none."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.dict(os.environ):
            _reset()
            try:
                return case(function)(*args, **kwargs)
            finally:
                _reset()

    return run


def _reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


@alone
def accelerate(stage: int, folder: str) -> dict[str, float]:
    """Return the errors of accelerate's loop, with a resumed state, against the engine's."""
    data = batches(6, torch.float32)
    plain = model_of()
    engine = engine_of(plain, stage, gradient_accumulation_steps=2)
    first = attach(engine, EFlatPerturbation(plain, **OPTIONS))
    for batch in data:
        step(engine, batch, 2)

    plugin = DeepSpeedPlugin(hf_ds_config=config_of(stage, gradient_accumulation_steps=2))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = model_of()
    adamw = torch.optim.AdamW(trainable(model), **ADAMW)
    prepared, optimizer = accelerator.prepare(model, adamw)
    perturbation = attach(prepared, EFlatPerturbation(model, **OPTIONS))

    def train(part: list[Any]) -> dict[str, Any]:
        for batch in part:
            x, y = own_part(batch)
            for micro in zip(x.chunk(2), y.chunk(2), strict=True):
                with accelerator.accumulate(prepared):
                    accelerator.backward(loss_of(prepared, micro))
                    optimizer.step()
                    optimizer.zero_grad()
        return {**weights(model), **perturbation.state_dict()["averages"]}

    train(data[:3])
    if stage < 3:  # where an engine must not load after it has saved
        accelerator.save_state(folder)
        finished = {name: value.clone() for name, value in train(data[3:]).items()}
        accelerator.load_state(folder)
        assert perturbation.steps == 3
        assert_same_bits(train(data[3:]), finished)
    else:
        train(data[3:])
    assert perturbation.steps == len(data)
    return {
        "weights": relative_errors(weights(model), weights(plain)),
        "averages": relative_errors(perturbation.averages, first.averages),
    }


class Recording(Trainer):
    """Record the inputs of each micro-batch, and the averages at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.inputs: list[Any] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.inputs.append(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


class Last(TrainerCallback):
    """Keep the weights and averages of the last step."""

    def __init__(self, callback: EFlatCallback) -> None:
        self.callback = callback

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        averages = self.callback.perturbation.averages
        self.averages = {name: average.clone() for name, average in averages.items()}
        self.weights = weights(model)


def trained(
    folder: str, stage: int, resume: str | None = None, **settings: Any
) -> tuple[Any, Last]:
    config = config_of(stage, gradient_accumulation_steps=2, gradient_clipping=1.0)
    settings = {
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "per_device_train_batch_size": config["train_micro_batch_size_per_gpu"],
        "adam_beta1": 0.9,
        "deepspeed": config,
        **settings,
    }
    callback = EFlatCallback(**OPTIONS)
    last = Last(callback)
    trainer = Recording(
        model=without_dropout(lora_bert()),
        args=arguments(Path(folder), **settings),
        train_dataset=Sentences(per_token=False),
        callbacks=[callback, last],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, last


@alone
def trainer(stage: int, folder: str) -> dict[str, float]:
    """Check that a run resumed by Trainer gives the bits of one that was not interrupted.

    Returns:
        Its errors against the engine's own loop.
    """
    trainer, whole = trained(folder, stage, save_strategy="steps", save_steps=3)
    unset_hf_deepspeed_config()
    _, resumed = trained(f"{folder}/second", stage, f"{folder}/checkpoint-3")
    assert_same_bits(resumed.weights, whole.weights)
    assert_same_bits(resumed.averages, whole.averages)
    assert all(average.any() for average in whole.averages.values())

    model = without_dropout(lora_bert())
    adamw = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    engine = engine_of(model, stage, adamw, gradient_accumulation_steps=2, gradient_clipping=1.0)
    perturbation = attach(engine, EFlatPerturbation(model, **OPTIONS))
    for inputs in trainer.inputs:
        engine.backward(engine(**inputs).loss)
        engine.step()
    assert perturbation.steps == 6
    return {
        "weights": relative_errors(weights(model), whole.weights),
        "averages": relative_errors(perturbation.averages, whole.averages),
    }
