"""Attention modules of PEFT, whose forward passes merge and unmerge, equal the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_layers import BETA, CLOSE, RHO, gradient_matrices, step_beside
from models import CREATE, assert_same_bits, trainable, weights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import create_eflat_optimizer, reference
from eflat_ext.lora import find_pairs

PAIRS = ["base_model.model.attention.default", "base_model.model.attention.base_layer.out_proj"]


class Attending(nn.Module):
    """Attention and a fixed linear readout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.attention(x, x, x, need_weights=False)[0])
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def lora_attention(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attention"])
    model = get_peft_model(Attending(), config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def batch() -> Tensor:
    return torch.randn(2, 3, 6, dtype=torch.float64)


def loss_at(model: nn.Module, x: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the loss of an attention module without LoRA that has PEFT's weights.

    PEFT 0.21 adds the delta of ``out_proj`` twice and takes its derivative once.
    """
    attention = copy.deepcopy(model.base_model.model.attention)
    outer, inner = attention, attention.base_layer.out_proj
    plain = Attending().double()
    values: dict[str, Tensor] = {}
    for (A, B), layer, name, extra in (
        (factors[0], outer, "attention.in_proj_weight", 0),
        (factors[1], inner, "attention.out_proj.weight", 1),
    ):
        base = attention.base_layer.in_proj_weight if layer is outer else inner.base_layer.weight
        change = layer.scaling["default"] * B @ A
        values[name] = base.detach() + change + extra * change.detach()
    for name, bias in (
        ("attention.in_proj_bias", attention.base_layer.in_proj_bias),
        ("attention.out_proj.bias", inner.base_layer.bias),
    ):
        values[name] = bias.detach()
    return torch.func.functional_call(plain, values, (x,))


def lora_factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in weights(model).items() if "lora_" in name}


def leaves(pairs: list[Any]) -> list[tuple[Tensor, Tensor]]:
    return [tuple(p.detach().clone().requires_grad_() for p in (pair.A, pair.B)) for pair in pairs]


def test_both_projections_are_pairs() -> None:
    model = lora_attention()
    pairs = find_pairs(model)
    assert [pair.layer_name for pair in pairs] == [PAIRS[0].removesuffix(".default"), PAIRS[1]]
    assert [tuple(pair.B.shape) for pair in pairs] == [(18, 2), (6, 2)]


@pytest.mark.proves("LoRA layers", "MultiheadAttention")
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("onto", ["A", "B"])
def test_eflat_lora(onto: str, base: type[torch.optim.Optimizer]) -> None:
    """Loss, gradients, averages and weights over three steps, and what is saved in between."""
    model = lora_attention()
    optimizer = create_eflat_optimizer(model, base, lr=0.05, rho=RHO, beta=BETA, onto=onto)
    pairs = optimizer.pairs
    shadow = [p.detach().clone().requires_grad_() for p in trainable(model)]
    plain = base(shadow, lr=0.05)
    averages = [torch.zeros_like(average) for average in optimizer.averages.values()]
    which = 0 if onto == "A" else 1
    for step in range(3):
        optimizer.zero_grad()
        x, before = batch(), lora_factors(model)
        expected = leaves(pairs)
        applied = averages
        if onto == "A":
            scaled = [(*f, pair.scaling) for f, pair in zip(expected, pairs, strict=True)]
            applied = reference.bounded(scaled, averages, RHO, "layer")
        with torch.no_grad():
            clean_loss = loss_at(model, x, expected)
            for pair, average in zip(expected, applied, strict=True):
                pair[which].add_(average)
        perturbed_loss = loss_at(model, x, expected)
        perturbed_loss.backward()
        loss = model(x)
        torch.testing.assert_close(loss, perturbed_loss, **CLOSE)
        assert step == 0 or not torch.isclose(loss, clean_loss, rtol=1e-6, atol=0)
        assert_same_bits(lora_factors(model), before)
        loss.backward()
        for index, (pair, leaf) in enumerate(zip(pairs, expected, strict=True)):
            gradients = gradient_matrices(pair)
            for grad, factor in zip(gradients, leaf, strict=True):
                torch.testing.assert_close(grad, factor.grad, **CLOSE)
            factors = [factor.detach() for factor in leaf]
            E, _ = reference.perturb(*factors, *gradients, pair.scaling, RHO, onto)
            averages[index] = (1 - BETA) * averages[index] + BETA * E
        step_beside(plain, shadow, optimizer, trainable(model), averages)


def merged_by(model: nn.Module) -> dict[str, Any]:
    """Merge by PEFT's model, by the module, or by its output projection alone."""
    layer = model.base_model.model.attention
    return {"model": model.base_model, "layer": layer, "inner": layer.base_layer.out_proj}


def base_weights(model: nn.Module) -> list[Tensor]:
    """Return the weights that merging changes."""
    base = model.base_model.model.attention.base_layer
    return [t.detach().clone() for t in (base.in_proj_weight, base.out_proj.base_layer.weight)]


@pytest.mark.parametrize("who", ["model", "layer", "inner"])
@pytest.mark.parametrize("method", CREATE)
def test_merging_finds_clean_weights(method: str, who: str) -> None:
    """The layer's own forward pass merges perturbed weights meanwhile."""
    model = lora_attention()
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch())
        loss.backward()
        return loss

    optimizer.step(closure)
    clean, x = lora_factors(model), batch()
    if method != "eflat":
        closure()
        optimizer.first_step()
    plain = copy.deepcopy(model)  # runs as it is
    y = plain(x)
    loss = model(x)
    assert not torch.isclose(loss, y, rtol=1e-6, atol=0)  # it was perturbed
    for each in (model, plain):
        merged_by(each)[who].merge_adapter() if who == "model" else merged_by(each)[who].merge()
    # Each pass of PEFT's rounds the weights of the base.
    torch.testing.assert_close(base_weights(model), base_weights(plain), **CLOSE)
    for each in (model, plain):
        merged_by(each)[who].unmerge_adapter() if who == "model" else merged_by(each)[who].unmerge()
    assert_same_bits(lora_factors(model), clean)
    torch.testing.assert_close(model(x), loss, **CLOSE)
    optimizer.remove_hooks()
    torch.testing.assert_close(model(x), y, **CLOSE)
    layer = model.base_model.model.attention
    assert not {"merge", "unmerge", "forward"} & vars(layer).keys()


def test_a_forward_pass_that_fails_leaves_clean_weights() -> None:
    model = lora_attention()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=1.0)
    x = batch()
    model(x).backward()
    optimizer.step()
    clean, expected = lora_factors(model), model(x).detach()
    assert not torch.isclose(expected, copy.deepcopy(model)(x), rtol=1e-6, atol=0)
    with pytest.raises((RuntimeError, AssertionError)):
        model(batch()[:, :, :5])
    assert_same_bits(lora_factors(model), clean)
    torch.testing.assert_close(model(x), expected, **CLOSE)
    optimizer.zero_grad()
    model(x).backward()
    optimizer.step()


def test_copies_of_a_model_are_inert() -> None:
    model = lora_attention()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=1.0)
    x = batch()
    model(x).backward()
    optimizer.step()
    with torch.no_grad():
        y = model.eval()(x)
        perturbed = model.train()(x)
        other = copy.deepcopy(model)
        torch.testing.assert_close(other.train()(x), y, **CLOSE)
        torch.testing.assert_close(model(x), perturbed, **CLOSE)
    assert not torch.isclose(y, perturbed, rtol=1e-6, atol=0)
