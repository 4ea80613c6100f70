"""Parameters and gradients whose dtype or memory layout changes or differs."""

from __future__ import annotations

import pytest
import torch
from models import CREATE, batches, lora_mlp, same_bits, train_on, trainable
from torch import nn

from eflat_ext import create_eflat_optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    train_on(model, optimizer, batches(steps, next(model.parameters()).dtype))


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_a_model_may_change_its_dtype(onto: str, to: torch.dtype) -> None:
    model = lora_mlp(torch.float32)
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, onto=onto)
    train(model, optimizer, 2)
    old = {name: average.clone() for name, average in optimizer.averages.items()}
    model.to(to)
    for name, average in optimizer.averages.items():
        assert average.dtype == (torch.float64 if to == torch.float64 else torch.float32)
        assert same_bits(average.float(), old[name])
    train(model, optimizer, 2)
    assert int(optimizer.skipped_perturbations) == 0
    assert all(not same_bits(x.float(), old[name]) for name, x in optimizer.averages.items())


@pytest.mark.parametrize("method", CREATE)
def test_gradients_may_have_another_dtype_than_their_parameters(method: str) -> None:
    """By ``grad_dtype``; the base optimizer has to support it, too."""
    model = lora_mlp(torch.bfloat16)
    for parameter in trainable(model):
        parameter.grad_dtype = torch.float32
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=0.3)
    train(model, optimizer, 2)
    assert next(p for p in trainable(model)).grad.dtype == torch.float32
    assert int(optimizer.skipped_perturbations) == 0
    assert all(bool(norm > 0) for norm in optimizer.perturbation_norms.values())


def test_a_factor_need_not_be_contiguous() -> None:
    model = lora_mlp()
    module = model.base_model.model.up.lora_B["default"]
    module.weight = nn.Parameter(torch.randn(4, 16, dtype=torch.float64).T)
    assert not module.weight.is_contiguous()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.1)
    train(model, optimizer, 3)
    assert all(bool(average.any()) for average in optimizer.averages.values())
