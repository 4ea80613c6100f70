"""Functions that the tests of Trainer with accelerate's FSDP2 run on each rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from models import assert_same_bits, lora_bert, without_dropout
from sharded_cases import relative_errors, whole
from torch.distributed.tensor import DTensor
from trainer_case import Sentences, arguments
from transformers import Trainer, TrainerCallback

from eflat_ext.trainer import EFlatCallback, eflat_optimizer

OPTIONS = {"rho": 0.3, "beta": 0.9}


@contextmanager
def cpu_as_a_gpu() -> Iterator[None]:
    """Make a context in which accelerate shards on CPUs, where it would take DDP instead."""
    backend = mock.patch.object(
        PartialState, "_prepare_backend", lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    )
    with mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu"), backend:
        try:
            yield
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


class Last(TrainerCallback):
    """Keep the weights and averages of the last step, whole."""

    def __init__(self, callback: Any = None) -> None:
        self.callback = callback

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        ours = optimizer.optimizer if self.callback is None else self.callback
        self.averages = whole(ours.perturbation.averages)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.sharded = all(isinstance(p, DTensor) for p in trained.values())
        self.weights = {n.removeprefix("module."): p for n, p in whole(trained).items()}


def trained(
    kind: str,
    folder: str,
    fsdp: dict[str, Any] | None,
    resume: str | None = None,
    **settings: Any,
) -> Last:
    """Train with FSDP2 in a configuration of accelerate's; with DDP for None."""
    settings = {"max_steps": 6, "lr_scheduler_type": "constant", **settings}
    if fsdp is not None:
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], **fsdp}
        settings.update(fsdp=True, fsdp_config=config, use_cpu=False)
    with cpu_as_a_gpu() if fsdp is not None else nullcontext():
        args = arguments(Path(folder), **settings)
        options: dict[str, Any] = {}
        callbacks: list[TrainerCallback] = []
        if kind == "optimizer":
            options["optimizer_cls_and_kwargs"] = eflat_optimizer(args, **OPTIONS)
        else:
            callbacks.append(EFlatCallback(**OPTIONS))
        last = Last(*callbacks)
        trainer = Trainer(
            model=without_dropout(lora_bert()),
            args=args,
            train_dataset=Sentences(per_token=False),
            callbacks=[*callbacks, last],
            **options,
        )
        trainer.train(resume_from_checkpoint=resume)
    assert last.sharded == (fsdp is not None)
    return last


def resumed(kind: str, folder: str, fsdp: dict[str, Any]) -> dict[str, float]:
    """Check that a resumed run gives the bits of one that was not interrupted.

    Returns:
        Its errors against a run with DDP, in the default configuration.
    """
    first = trained(kind, folder, fsdp, save_strategy="steps", save_steps=3)
    second = trained(kind, f"{folder}/second", fsdp, resume=f"{folder}/checkpoint-3")
    assert_same_bits(second.weights, first.weights)
    assert_same_bits(second.averages, first.averages)
    assert all(average.any() for average in first.averages.values())
    if fsdp:
        return {}
    replicated = trained(kind, f"{folder}/third", None)
    return {
        "weights": relative_errors(first.weights, replicated.weights),
        "averages": relative_errors(first.averages, replicated.averages),
    }
