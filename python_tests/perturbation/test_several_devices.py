"""Models over several devices in one process, as by ``device_map``: one operator call a device."""

from __future__ import annotations

import os
from pathlib import Path

import own_process
import pytest
import second_device
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import (
    EFlatPerturbation,
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)

STEPS = 5
HERE = "EFLAT_TEST_SECOND_DEVICE" in os.environ
pytestmark = pytest.mark.filterwarnings("ignore:eflat_ext has no kernels")
with_second_device = pytest.mark.skipif(not HERE, reason="run by the first test, where it is")


@pytest.mark.skipif(HERE, reason="starts this process")
def test_with_a_second_device() -> None:
    own_process.run(Path(__file__), EFLAT_TEST_SECOND_DEVICE="1")


class Stages(nn.Module):
    """Three layers; activations go to the device of the next one, as accelerate's hooks do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.up, self.down, self.out):
            x = torch.tanh(layer(x.to(next(layer.parameters()).device)))
        return x


def stages(dtype: torch.dtype, several: bool | str) -> nn.Module:
    """Return the model: on the CPU, one layer elsewhere, or all of it ("all")."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["up", "down", "out"], init_lora_weights=False)
    model = get_peft_model(Stages(), config).to(dtype).train()
    if several:
        moved = model if several == "all" else model.base_model.model.down
        moved.to(second_device.NAME)
    return model


def loss_of(model: nn.Module, step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=g).to(next(model.parameters()).dtype)
    labels = torch.randint(0, 3, (8,), generator=g)
    return nn.functional.cross_entropy(model(x).cpu(), labels)


def trained(
    create, dtype: torch.dtype, several: bool | str, **options
) -> tuple[list[Tensor], dict]:
    """Return the factors, and the norms and counts, after some steps, on the CPU."""
    model = stages(dtype, several)
    optimizer = create(model, torch.optim.AdamW, lr=1e-2, rho=0.3, **options)
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    found = {name: float(norm) for name, norm in optimizer.perturbation_norms.items()}
    found["skipped"] = int(optimizer.skipped_perturbations)
    return [p.detach().cpu() for p in model.parameters() if p.requires_grad], found


def relative_error(given: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(given, expected, strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


@with_second_device
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ["B", "A", "both"])
@pytest.mark.parametrize("create", [create_eflat_optimizer, create_flat_optimizer])
@pytest.mark.proves("Several devices", "one model over several devices (`device_map`): as on one")
def test_steps_are_those_of_one_device(create, onto, norm_scope) -> None:
    options = {"onto": onto, "norm_scope": norm_scope}
    one, numbers = trained(create, torch.float64, False, **options)
    several, numbers_of_several = trained(create, torch.float64, True, **options)
    assert relative_error(several, one) < 1e-9
    assert numbers_of_several == pytest.approx(numbers, rel=1e-9)


@with_second_device
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
def test_lora_sam(norm_scope: str) -> None:
    one, numbers = trained(create_lora_sam_optimizer, torch.float64, False, norm_scope=norm_scope)
    several, of_several = trained(
        create_lora_sam_optimizer, torch.float64, True, norm_scope=norm_scope
    )
    assert relative_error(several, one) < 1e-9 and of_several == pytest.approx(numbers, rel=1e-9)


@with_second_device
@pytest.mark.parametrize("create", [create_eflat_optimizer, create_flat_optimizer])
@pytest.mark.proves("Several devices", "a device without kernels: as on the CPU")
def test_a_model_on_a_device_without_kernels(create) -> None:
    on_cpu, numbers = trained(create, torch.float64, False)
    there, numbers_there = trained(create, torch.float64, "all")
    assert relative_error(there, on_cpu) < 1e-9
    assert numbers_there == pytest.approx(numbers, rel=1e-9)


@with_second_device
def test_a_norm_over_all_devices_differs_from_one_for_each_layer() -> None:
    layer, _ = trained(create_eflat_optimizer, torch.float64, True)
    whole, _ = trained(create_eflat_optimizer, torch.float64, True, norm_scope="global")
    assert relative_error(layer, whole) > 1e-3


@with_second_device
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
def test_a_gradient_that_is_not_finite_leaves_out_its_layer(norm_scope: str) -> None:
    updated = {}
    for several in (False, True):
        model = stages(torch.float32, several)
        perturbation = EFlatPerturbation(model, rho=0.3, norm_scope=norm_scope)
        for step in range(2):
            model.zero_grad()
            loss_of(model, step).backward()
            if step:
                model.base_model.model.down.lora_B["default"].weight.grad.fill_(torch.nan)
            perturbation.update()
        assert int(perturbation.skipped) == 1
        updated[several] = [average.cpu() for average in perturbation.averages.values()]
    assert relative_error(updated[True], updated[False]) < 1e-6


@with_second_device
@pytest.mark.parametrize("size", [1.0, 1e12])
def test_the_bound_onto_A_is_one_over_all_devices(size: float) -> None:
    norms = {}
    for several in (False, True):
        model = stages(torch.float32, several)
        perturbation = EFlatPerturbation(model, rho=0.3, onto="A", norm_scope="global")
        loss_of(model, 0).backward()
        perturbation.update()
        with torch.no_grad():
            model.base_model.model.up.lora_B["default"].weight.mul_(size)
            loss_of(model, 1)  # which uses the averages
        squares = [
            (pair.scaling * (pair.B.cpu().double() @ factor.E.cpu().double())).square().sum()
            for _, pair, _, factor in perturbation.targets
        ]
        norms[several] = float(torch.stack(squares).sum().sqrt())
    assert norms[True] == pytest.approx(norms[False], rel=1e-5)
    assert norms[True] <= 0.3 * (1 + 1e-5)


@with_second_device
@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_a_model_that_was_moved_since(onto: str) -> None:
    model = stages(torch.float32, False)
    perturbation = EFlatPerturbation(model, rho=0.3, onto=onto)
    loss_of(model, 0).backward()
    perturbation.update()
    for factor in perturbation.factors:  # as if the model had been there until now
        own = factor.average is factor.E
        factor.E = factor.E.to(second_device.NAME)
        factor.average = factor.E if own else factor.average.to(second_device.NAME)
        factor.fitted_to = factor.E.device, factor.parameter.dtype
    if perturbation._bound is not None:
        perturbation._bound.average_changed()
    loss_of(model, 1).backward()
    perturbation.update()
    assert all(factor.E.device.type == "cpu" for factor in perturbation.factors)


@with_second_device
def test_checkpoints_go_from_one_device_to_several() -> None:
    one, several = (EFlatPerturbation(stages(torch.float32, s), rho=0.3) for s in (False, True))
    loss_of(one._model, 0).backward()
    one.update()
    several.load_state_dict(one.state_dict())
    for given, expected in zip(several.averages.values(), one.averages.values(), strict=True):
        assert torch.equal(given.cpu(), expected)
    assert {average.device.type for average in several.averages.values()} == {
        "cpu",
        second_device.NAME,
    }


@with_second_device
def test_factors_of_a_layer_on_two_devices_are_refused() -> None:
    model = stages(torch.float32, False)
    model.base_model.model.down.lora_A.to(second_device.NAME)
    with pytest.raises(ValueError, match=r"A and B of a layer on one device, got second:0 and cpu"):
        create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2)
