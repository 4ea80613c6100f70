"""Warnings point at the user's line that they are about."""

from __future__ import annotations

import linecache

import pytest
import torch
from models import CREATE, batches, lora_mlp, lora_weights, loss_of, trainable
from torch import nn

from eflat_ext import EFlatLoRA, create_eflat_optimizer
from eflat_ext.lora import find_pairs


def assert_here(caught: pytest.WarningsRecorder, line: str) -> None:
    assert [(w.filename, linecache.getline(w.filename, w.lineno).strip()) for w in caught] == [
        (__file__, line)
    ]


@pytest.mark.parametrize("schedules", [0, 1, 2])
@pytest.mark.parametrize("method", CREATE)
def test_a_gradient_without_perturbation_points_at_the_step(method: str, schedules: int) -> None:
    model = lora_mlp().eval()
    optimizer = CREATE[method](model, torch.optim.AdamW, lr=0.1)
    for _ in range(schedules):  # they wrap its step
        torch.optim.lr_scheduler.StepLR(optimizer, 3)

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()

    with pytest.warns(UserWarning, match="without the perturbation") as caught:
        for _ in range(2):
            optimizer.step(closure)
    assert_here(caught, "optimizer.step(closure)")


def test_frozen_factors_point_at_the_constructor() -> None:
    model = lora_mlp()
    lora_weights(model, "B")[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="is frozen") as caught:
        base = torch.optim.SGD(trainable(model), lr=0.1)
        EFlatLoRA(model, base)
    assert_here(caught, "EFlatLoRA(model, base)")
    with pytest.warns(UserWarning, match="is frozen") as caught:
        create_eflat_optimizer(model, torch.optim.SGD, lr=0.1)
    assert_here(caught, "create_eflat_optimizer(model, torch.optim.SGD, lr=0.1)")


def test_unsupported_layers_point_at_the_call() -> None:
    model = lora_mlp()
    model.base_model.model.up.lora_A["default"] = nn.Identity()
    with pytest.warns(UserWarning, match="no plain pair") as caught:
        find_pairs(model)
    assert_here(caught, "find_pairs(model)")
    with pytest.warns(UserWarning, match="no plain pair") as caught:
        create_eflat_optimizer(model, torch.optim.SGD, lr=0.1)
    assert_here(caught, "create_eflat_optimizer(model, torch.optim.SGD, lr=0.1)")
