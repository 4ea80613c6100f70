"""Flat-LoRA and LoRA-SAM by first_step and second_step, for loops without a closure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import (
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    same_bits,
    train_on,
    trainable,
    weights,
)
from torch import nn

from eflat_ext import create_flat_optimizer, create_lora_sam_optimizer

pytestmark = pytest.mark.parametrize("create", [create_flat_optimizer, create_lora_sam_optimizer])


def runs_clean(model: nn.Module) -> bool:
    """Return True if a training pass equals an evaluation; the model has no dropout."""
    batch = batches(1)[0]
    loss = loss_of(model.eval(), batch)
    return same_bits(loss_of(model.train(), batch), loss)


def test_two_gradients_in_two_calls_equal_the_closure(create: Callable) -> None:
    model, other = lora_mlp(), lora_mlp()
    optimizer, closures = (create(m, torch.optim.AdamW, lr=0.01) for m in (model, other))
    train_on(other, closures, batches(3))
    for batch in batches(3):
        optimizer.zero_grad()
        (loss_of(model, batch) * 1024).backward()  # the scale of the loss makes no difference
        optimizer.first_step()
        assert all(p.grad is None for p in trainable(model))
        loss_of(model, batch).backward()
        optimizer.second_step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_calls_out_of_order_are_refused(create: Callable) -> None:
    model = lora_mlp()
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    for call in (optimizer.second_step, optimizer.step):
        with pytest.raises(RuntimeError, match=r"first_step\(\) before"):
            call()
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step()
    for call in (optimizer.first_step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(RuntimeError, match="abandon_step"):
            call()
    assert not runs_clean(model)
    optimizer.abandon_step()
    assert runs_clean(model)
    with pytest.raises(RuntimeError, match=r"first_step\(\) before"):
        optimizer.second_step()


def test_second_gradients_of_zero_at_a_learning_rate_of_zero_are_stepped(create: Callable) -> None:
    """It looks like the step by which torch.distributed.checkpoint creates state."""
    model = lora_mlp()
    optimizer = create(model, torch.optim.AdamW, lr=0.0)
    loss_of(model, batches(1)[0]).backward()
    clean = weights(model)
    optimizer.first_step()
    (0 * loss_of(model, batches(1)[0])).backward()
    optimizer.second_step()
    assert_same_bits(weights(model), clean)
    assert runs_clean(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step()


def test_a_skipped_second_step_raises_at_the_next_first_step(create: Callable) -> None:
    """``model.zero_grad()`` cannot tell the optimizer that the step was given up."""
    model = lora_mlp()
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step()
    loss_of(model, batches(1)[0]).backward()
    model.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="abandon_step"):
        optimizer.first_step()


def test_second_gradients_dropped_by_the_model_abandon_a_step_that_kept_the_first(
    create: Callable,
) -> None:
    """As when a scaler skips ``step`` after an overflow and the loop goes on with ``zero_grad``."""
    model = lora_mlp()
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=False)
    model.zero_grad()
    assert not runs_clean(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.zero_grad()
    assert runs_clean(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step()


@pytest.mark.parametrize("tiny", [1e-24, 1e-40])
def test_tiny_gradients_perturb_as_others_do(create: Callable, tiny: float) -> None:
    """Also where their squares, or rho over their norm, are beyond float32."""
    moved = []
    for scale in (1.0, tiny):
        model = lora_mlp(torch.float32)
        optimizer = create(model, torch.optim.SGD, lr=0.1, rho=0.3)
        for parameter in trainable(model):
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            ).mul_(scale)
        optimizer.first_step()
        moved.append([point - p.detach() for p, point in optimizer.points().items()])
        assert int(optimizer.skipped_perturbations) == 0
        optimizer.abandon_step()
    assert sum(change.abs().max() > 1e-2 for change in moved[0]) >= 2  # a factor of each pair
    for change, expected in zip(*moved, strict=True):
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero_grad", [True, False])
def test_dropping_the_second_gradients_abandons_the_step(create: Callable, zero_grad: bool) -> None:
    model = lora_mlp()
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step(zero_grad=zero_grad)
    optimizer.zero_grad()  # the first gradients, or nothing
    assert not runs_clean(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.zero_grad()
    assert runs_clean(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.first_step()
