"""Weights that users edit, read or average within a step, against a functional float64 loop.

The loop computes the loss at ``B + E`` by ``torch.func.functional_call``, without hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eflat_case import BETA, CLOSE, LR, RHO, eflat
from models import (
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    train_on,
    trainable,
    weights,
)
from torch import Tensor, nn
from torch.func import functional_call

from eflat_ext import reference
from eflat_ext.lora import find_pairs

Edit = Callable[[nn.Module], None]


class Judge:
    """EFlat-LoRA onto B with SGD, as a loop over functional parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.values = weights(self.model)
        self.trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        self.pairs = [
            (f"{pair.layer_name}.lora_A.default.weight", f"{pair.layer_name}.lora_B.default.weight")
            for pair in find_pairs(self.model)
        ]
        self.scaling = [pair.scaling for pair in find_pairs(self.model)]
        self.E = {b: torch.zeros_like(self.values[b]) for _, b in self.pairs}

    def gradients(self, loss: Callable[[Callable[..., Tensor]], Tensor]) -> dict[str, Tensor]:
        """Return gradients of ``loss(call)``, where ``call`` runs the model at the point."""
        leaves = {n: self.values[n].clone().requires_grad_() for n in self.trained}
        point = {n: v + self.E[n] if n in self.E else v for n, v in leaves.items()}
        found = loss(lambda x: functional_call(self.model, {**self.values, **point}, (x,)))
        made = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
        return {
            n: torch.zeros_like(leaves[n]) if g is None else g
            for n, g in zip(leaves, made, strict=True)
        }

    def step(self, gradients: dict[str, Tensor]) -> None:
        for (a, b), s in zip(self.pairs, self.scaling, strict=True):
            A, B = self.values[a], self.values[b] + self.E[b]
            E, _ = reference.perturb(A, B, gradients[a], gradients[b], s, RHO, "B")
            self.E[b] = (1 - BETA) * self.E[b] + BETA * E
        for name, gradient in gradients.items():
            self.values[name] = self.values[name] - LR * gradient

    def agrees(self, model: nn.Module) -> None:
        for name, value in weights(model).items():
            torch.testing.assert_close(value, self.values[name], **CLOSE, msg=name)


def cross_entropy(batch: Any, call: Callable[[Tensor], Tensor]) -> Tensor:
    return nn.functional.cross_entropy(call(batch[0]), batch[1])


def _shrink(model: nn.Module) -> None:
    for parameter in trainable(model):
        parameter.copy_(0.9 * parameter)


def _shrink_foreach(model: nn.Module) -> None:
    parameters = trainable(model)
    torch._foreach_copy_(parameters, torch._foreach_mul(parameters, 0.9))


def _shrink_as_a_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(trainable(model))
    nn.utils.vector_to_parameters(0.9 * vector, trainable(model))


@pytest.mark.proves("Plain loops", "edited in the middle of a step: copy_, foreach, vectors, noise")
@pytest.mark.parametrize("edit", [_shrink, _shrink_foreach, _shrink_as_a_vector])
@pytest.mark.parametrize("when", ["before backward", "after backward", "between micro-batches"])
def test_edits_in_the_middle_of_a_step_stay(edit: Edit, when: str) -> None:
    """Also an EMA that is swapped in after an incomplete accumulation at an epoch's end."""
    model = lora_mlp()
    optimizer, judge = eflat(model), Judge(model)
    data = batches(8)
    for one, two in zip(data[::2], data[1::2], strict=True):
        optimizer.zero_grad()
        loss = loss_of(model, one)
        expected = judge.gradients(lambda call, one=one: cross_entropy(one, call))
        if when == "before backward":  # autograd keeps the tensors that the pass has saved
            with torch.no_grad():
                saved = [p.detach().clone() for p in trainable(model)]
            loss.backward()
            assert_same_bits(
                dict(enumerate(saved)), dict(enumerate(p.detach() for p in trainable(model)))
            )
        else:
            loss.backward()
        if when == "between micro-batches":
            with torch.no_grad():
                edit(model)
            judge.values |= {n: 0.9 * judge.values[n] for n in judge.trained}
        loss_of(model, two).backward()
        second = judge.gradients(lambda call, two=two: cross_entropy(two, call))
        expected = {n: g + second[n] for n, g in expected.items()}
        if when != "between micro-batches":
            with torch.no_grad():
                edit(model)
            judge.values |= {n: 0.9 * judge.values[n] for n in judge.trained}
        optimizer.step()
        judge.step(expected)
    judge.agrees(model)


@pytest.mark.parametrize("lr", [0.0, LR])
def test_weight_noise_added_before_the_pass_and_subtracted_before_the_step(lr: float) -> None:
    model = lora_mlp()
    optimizer, start = eflat(model, lr=lr), weights(model)
    for batch in batches(5):
        noise = [0.1 * torch.randn_like(p) for p in trainable(model)]
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_add_(trainable(model), noise)
        loss_of(model, batch).backward()
        with torch.no_grad():
            torch._foreach_sub_(trainable(model), noise)
        before = weights(model)
        optimizer.step()
        for name, parameter in model.named_parameters():
            step = lr * parameter.grad if parameter.requires_grad else 0
            torch.testing.assert_close(parameter.detach(), before[name] - step, **CLOSE)
    if lr == 0:
        for name, value in weights(model).items():
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["before the pass", "after the pass"])
def test_a_penalty_on_weights_is_of_the_clean_ones(where: str) -> None:
    model = lora_mlp()
    optimizer, judge = eflat(model), Judge(model)

    def penalty(parameters: Any) -> Tensor:
        return 0.1 * sum(p.square().sum() for p in parameters)

    for batch in batches(4):
        optimizer.zero_grad()
        if where == "before the pass":
            extra = penalty(trainable(model))
            loss = loss_of(model, batch) + extra
        else:
            loss = loss_of(model, batch) + penalty(trainable(model))
        loss.backward()
        gradients = judge.gradients(lambda call, batch=batch: cross_entropy(batch, call))
        gradients = {n: g + 0.2 * judge.values[n] for n, g in gradients.items()}
        optimizer.step()
        judge.step(gradients)
    judge.agrees(model)


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_an_evaluation_between_forward_and_backward(rho: float) -> None:
    model, other = lora_mlp(), lora_mlp()
    optimizer, plain = eflat(model, rho=rho), eflat(other, rho=rho)
    for batch in batches(4):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        model.eval()
        with torch.no_grad():
            clean = functional_call(model, weights(model), (batch[0],))
            assert torch.equal(model(batch[0]), clean)
        model.train()
        loss.backward()
        optimizer.step()
    train_on(other, plain, batches(4))
    assert_same_bits(weights(model), weights(other))


def test_averages_of_weights_updated_between_backward_and_step_are_of_the_clean_ones() -> None:
    model = lora_mlp()
    optimizer = eflat(model)
    train_on(model, optimizer, batches(3))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    loss_of(model, batches(1)[0]).backward()
    before = weights(model)
    averaged.update_parameters(model)
    assert_same_bits(weights(averaged.module), before)
    assert torch.equal(
        averaged.module.train()(batches(1)[0][0]), copy.deepcopy(model)(batches(1)[0][0])
    )
