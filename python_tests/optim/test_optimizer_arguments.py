"""Arguments that the optimizers refuse are named, and a refusal leaves nothing behind."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import pytest
import torch
from models import CREATE, batches, lora_mlp, train_on
from torch import nn

from eflat_ext import create_eflat_optimizer, create_flat_optimizer

DOWN = "base_model.model.down.default"


class SomeSAM(torch.optim.SGD):
    """A class named like optimizers that perturb the weights themselves."""


class TwoSteps(torch.optim.SGD):
    """A class with a method of theirs."""

    def first_step(self) -> None: ...


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_bad_arguments_are_named_and_leave_nothing_behind(create: Callable) -> None:
    model = lora_mlp()
    for rho in (-1.0, math.nan, math.inf):
        for bad in (rho, lambda step, rho=rho: rho):
            with pytest.raises(ValueError, match=r"rho must .* got"):
                create(model, torch.optim.SGD, lr=0.1, rho=bad)
    for bad in ("0.05", None, lambda step: "0.05"):
        with pytest.raises(TypeError, match=r"rho must .* got"):
            create(model, torch.optim.SGD, lr=0.1, rho=bad)
    with pytest.raises(ValueError, match=r"norm_scope must .* got 'all'"):
        create(model, torch.optim.SGD, lr=0.1, norm_scope="all")
    with pytest.raises(TypeError, match="LBFGS evaluates a closure"):
        create(model, torch.optim.LBFGS)
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="optimizer must train LoRA factors"):
        create(model, lambda params: base)
    with pytest.raises(TypeError, match=r"base must be a torch\.optim\.Optimizer, got L"):
        create(model, lambda params: nn.Linear(1, 1))
    with pytest.raises(ValueError, match="base must minimise"):
        create(model, torch.optim.SGD, lr=0.1, maximize=True)
    for perturbing in (SomeSAM, TwoSteps):
        with pytest.raises(
            TypeError, match=f"base must .*: {perturbing.__name__} perturbs the weights"
        ):
            create(model, perturbing, lr=0.1)
    gc.collect()  # none of these left anything behind
    assert not any("forward" in vars(module) for module in model.modules())
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="base must be a plain optimizer"):
        create(model, lambda params: optimizer)
    optimizer.rho = 0.5
    with pytest.raises(ValueError, match="rho"):
        optimizer.rho = -1
    assert optimizer.rho == 0.5


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_an_optimizer_whose_constructor_raised_perturbs_nothing(create: Callable) -> None:
    """The exception keeps it alive, as a notebook keeps the last one."""
    model = lora_mlp()
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    with pytest.raises(ValueError, match="optimizer must train LoRA factors") as held:
        create(model, torch.optim.SGD, lr=0.1, params=head)
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    train_on(model, optimizer, batches(2))
    optimizer.remove_hooks()
    assert not any("forward" in vars(module) for module in model.modules())
    del held


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_bad_models_are_named(create: Callable) -> None:
    with pytest.raises(TypeError, match=r"optimizer_cls must .* got an instance of SGD"):
        create(lora_mlp(), torch.optim.SGD(lora_mlp().parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        create(None, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="model must have trainable parameters, got Peft"):
        create(lora_mlp().requires_grad_(False), torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_options_cannot_be_changed_later(create: Callable) -> None:
    optimizer = create(lora_mlp(), torch.optim.SGD, lr=0.1)
    for name in {"beta", "onto", "rtol", "norm_scope"} & set(dir(optimizer)):
        with pytest.raises(AttributeError):
            setattr(optimizer, name, 7)


@pytest.mark.parametrize(
    "bad", [{"onto": "C"}, *({"rtol": rtol} for rtol in (0.0, 1.0, math.nan, "x", [1e-3]))]
)
@pytest.mark.parametrize("create", [create_eflat_optimizer, create_flat_optimizer])
def test_bad_arguments_of_the_transfer_are_named(create: Callable, bad: dict[str, object]) -> None:
    error = TypeError if bad.get("rtol") in ("x", [1e-3]) else ValueError
    with pytest.raises(error, match=f"{next(iter(bad))} must .* got"):
        create(lora_mlp(), torch.optim.SGD, lr=0.1, **bad)


@pytest.mark.parametrize("create", [create_eflat_optimizer, create_flat_optimizer])
def test_factors_that_the_operators_do_not_take_are_named(create: Callable) -> None:
    apart = lora_mlp()
    apart.base_model.model.down.lora_A.to("meta")
    says = f"model must .* one device, got meta and cpu of {DOWN}"
    with pytest.raises(ValueError, match=says):
        create(apart, torch.optim.SGD, lr=0.1)
    mixed = lora_mlp()
    mixed.base_model.model.down.lora_A.to(torch.bfloat16)
    says = f"model must .* one dtype, got torch.bfloat16 and torch.float64 of {DOWN}"
    with pytest.raises(TypeError, match=says):
        create(mixed, torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1, math.nan, "x", None])
def test_a_bad_beta_is_named(beta: object) -> None:
    error = TypeError if beta in ("x", None) else ValueError
    with pytest.raises(error, match=r"beta must be .* got"):
        create_eflat_optimizer(lora_mlp(), torch.optim.SGD, lr=0.1, beta=beta)
