"""EFlatPerturbation attached to an optimizer, or updated by hand as for an engine."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import pytorch_optimizer
import torch
from eflat_case import LR, OPTIMIZERS, RHO, train
from models import (
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    trainable,
    weights,
)
from torch import nn

import eflat_ext
from eflat_ext import EFlatPerturbation, create_eflat_optimizer


def in_an_engine(model: nn.Module, perturbation: EFlatPerturbation, base: Any, data: Any) -> None:
    """Train as an engine that owns gradients: ``parameter.grad`` is None at the update."""
    for batch in data:
        loss = loss_of(model, batch)
        parameters = trainable(model)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        perturbation.update(gradients)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        base.step()
        base.zero_grad()


@pytest.mark.proves("Plain loops", "any torch optimizer that exists, by `EFlatPerturbation.attach`")
@pytest.mark.parametrize("closures", [False, True])
@pytest.mark.parametrize("onto", ["A", "B", "both"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_steps_are_those_of_the_optimizer(name: str, onto: str, closures: bool) -> None:
    model, other = lora_mlp(), lora_mlp()
    base = OPTIMIZERS[name](trainable(model))
    perturbation = EFlatPerturbation(model, rho=RHO, onto=onto).attach(base)
    whole = eflat_ext.EFlatLoRA(
        other, OPTIMIZERS[name](trainable(other)), rho=RHO, onto=onto, fused_step=False
    )
    train(model, base, batches(12), closures)
    train(other, whole, batches(12), closures)
    assert_same_bits(weights(model), weights(other))
    assert_same_bits(perturbation.averages, whole.averages)
    assert perturbation.norms.keys() == whole.perturbation_norms.keys()
    assert perturbation.steps == 12 and base.param_groups[0]["perturbation_rho"] == RHO


@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_updates_from_gradients_of_an_engine_equal_the_optimizers_steps(onto: str) -> None:
    model, other = lora_mlp(), lora_mlp()
    perturbation = EFlatPerturbation(model, rho=RHO, onto=onto)
    in_an_engine(model, perturbation, OPTIMIZERS["SGD"](trainable(model)), batches(6))
    whole = eflat_ext.EFlatLoRA(other, OPTIMIZERS["SGD"](trainable(other)), rho=RHO, onto=onto)
    train(other, whole, batches(6))
    assert_same_bits(weights(model), weights(other))
    assert_same_bits(perturbation.averages, whole.averages)


@pytest.mark.parametrize("onto", ["A", "B", "both"])
def test_an_attached_optimizer_saves_and_resumes(onto: str) -> None:
    def make(seed: int) -> tuple[nn.Module, Any, EFlatPerturbation]:
        model = lora_mlp(seed=seed)
        base = torch.optim.AdamW(trainable(model), lr=LR)
        return model, base, EFlatPerturbation(model, rho=RHO, onto=onto).attach(base)

    model, base, perturbation = make(0)
    train(model, base, batches(3))
    saved = copy.deepcopy((model.state_dict(), base.state_dict(), perturbation.state_dict()))
    assert "perturbation_rho" not in saved[1]["param_groups"][0]
    train(model, base, batches(6)[3:])
    for own in (False, True):
        other, again, resumed = make(1)
        other.load_state_dict(saved[0])
        again.load_state_dict(copy.deepcopy(saved[1]))
        if own:  # an engine saves it by itself
            resumed.load_averages([None] * len(resumed.factors))
            resumed.load_state_dict(saved[2])
        train(other, again, batches(6)[3:])
        assert_same_bits(weights(other), weights(model))
        assert_same_bits(resumed.averages, perturbation.averages)
        assert (resumed.steps, int(resumed.skipped)) == (6, int(perturbation.skipped))


def test_the_optimizers_state_stays_as_it_is_where_the_perturbation_is_saved_apart() -> None:
    """Each state loads by itself, the optimizer's into one without a perturbation."""
    plain, model, resumed = lora_mlp(), lora_mlp(), lora_mlp(seed=1)
    bases = [OPTIMIZERS["AdamW foreach"](trainable(one)) for one in (plain, model, resumed)]
    perturbation = EFlatPerturbation(model, rho=RHO).attach(bases[1], save_state=False)
    for one, base in ((plain, bases[0]), (model, bases[1])):
        train(one, base, batches(3))
    state, as_plain = bases[1].state_dict(), bases[0].state_dict()
    assert state["param_groups"] == as_plain["param_groups"]
    for at in as_plain["state"]:
        assert state["state"][at].keys() == as_plain["state"][at].keys()
    averages = copy.deepcopy(perturbation.state_dict())
    resumed.load_state_dict(model.state_dict())
    bases[2].load_state_dict(copy.deepcopy(state))
    again = EFlatPerturbation(resumed, rho=RHO).attach(bases[2], save_state=False)
    again.load_state_dict(averages)
    for one, base in ((model, bases[1]), (resumed, bases[2])):
        train(one, base, batches(6)[3:])
    assert_same_bits(weights(model), weights(resumed))
    assert_same_bits(perturbation.averages, again.averages)
    assert again.steps == 6


def test_the_optimizer_keeps_it_alive_and_it_goes_with_it() -> None:
    model = lora_mlp()
    base = torch.optim.SGD(trainable(model), lr=LR)
    alive = weakref.ref(EFlatPerturbation(model, rho=RHO).attach(base))
    train(model, base, batches(2))
    gc.collect()
    assert alive() is not None
    x = batches(1)[0][0]
    perturbed = model(x)
    del base  # collected at once, not after the next optimizer's first steps
    assert alive() is None
    assert not torch.equal(model(x), perturbed) and torch.equal(model(x), model.eval()(x))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert layers and not any(
        {"forward", "_replicate_for_data_parallel"} & vars(m).keys() for m in layers
    )


def test_attach_claims_the_pairs_that_the_optimizer_trains() -> None:
    model = lora_mlp()
    up = [p for n, p in model.named_parameters() if ".up." in n and p.requires_grad]
    with pytest.warns(UserWarning, match=r"down\.default"):
        perturbation = EFlatPerturbation(model, rho=RHO).attach(torch.optim.SGD(up, lr=LR))
    assert [pair.layer_name.split(".")[-1] for pair in perturbation.pairs] == ["up"]


def test_attach_refuses_other_optimizers_and_a_second_call() -> None:
    model = lora_mlp()
    head = [p for n, p in model.named_parameters() if "head" in n and p.requires_grad]
    with pytest.raises(ValueError, match="optimizer must train LoRA factors, but none of"):
        EFlatPerturbation(model).attach(torch.optim.SGD(head, lr=LR))
    base = torch.optim.SGD(trainable(model), lr=LR)
    perturbation = EFlatPerturbation(model).attach(base)
    with pytest.raises(RuntimeError, match="attached to an optimizer already"):
        perturbation.attach(base)
    for bad, error in ((None, TypeError), (torch.optim.LBFGS(trainable(model)), TypeError)):
        with pytest.raises(error, match="optimizer must"):
            EFlatPerturbation(model).attach(bad)
    with pytest.raises(ValueError, match=r"optimizer must .*maximize"):
        EFlatPerturbation(model).attach(torch.optim.SGD(trainable(model), lr=LR, maximize=True))
    ours = create_eflat_optimizer(model, torch.optim.SGD, lr=LR)
    with pytest.raises(TypeError, match=r"optimizer must .*EFlatLoRA"):
        EFlatPerturbation(model).attach(ours)


def test_once_removed_it_perturbs_nothing_and_the_optimizer_is_as_before() -> None:
    model, other = lora_mlp(), lora_mlp()
    base, plain = (torch.optim.SGD(trainable(m), lr=LR) for m in (model, other))
    perturbation = EFlatPerturbation(model, rho=RHO).attach(base)
    train(model, base, batches(2))
    perturbation.remove()
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, base, batches(3))
    train(other, plain, batches(3))
    assert_same_bits(weights(model), weights(other))
    assert "perturbation_ema" not in str(base.state_dict()["state"].get(0, {}).keys())
    with pytest.raises(RuntimeError, match="it was removed"):
        perturbation.update()


def test_a_newer_one_attached_to_the_same_optimizer_takes_over() -> None:
    """As when a cell that attaches runs again; the first one leaves the optimizer."""
    model, other = lora_mlp(), lora_mlp()
    base, alone = (torch.optim.SGD(trainable(m), lr=LR) for m in (model, other))
    EFlatPerturbation(model, rho=RHO).attach(base)
    EFlatPerturbation(model, rho=RHO).attach(base)
    EFlatPerturbation(other, rho=RHO).attach(alone)
    train(model, base, batches(3))
    train(other, alone, batches(3))
    assert_same_bits(weights(model), weights(other))
    optimizer = eflat_ext.EFlatLoRA(model, base, rho=RHO)
    train(model, optimizer, batches(1))


def test_an_updated_one_ends_when_another_optimizer_steps_without_update() -> None:
    model = lora_mlp()
    perturbation = EFlatPerturbation(model, rho=RHO)
    base = OPTIMIZERS["SGD"](trainable(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(3):
            base.zero_grad()
            loss_of(model, batch).backward()
            perturbation.update()
            base.step()
    with pytest.warns(UserWarning, match="SGD stepped weights that it perturbs"):
        base.step()
    with pytest.raises(RuntimeError, match="has ended: SGD stepped"):
        perturbation.update()
    never = EFlatPerturbation(model, rho=RHO)
    loss_of(model, batches(1)[0]).backward()
    with pytest.warns(UserWarning, match="SGD stepped weights that it perturbs"):
        base.step()
    assert never.ended


@pytest.mark.parametrize("kind", ["Lookahead", "8-bit"])
def test_optimizers_with_a_state_dict_of_their_own_keep_the_averages(kind: str) -> None:
    def make(model: nn.Module) -> Any:
        if kind == "8-bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(trainable(model), lr=LR, min_8bit_size=1)
        return pytorch_optimizer.Lookahead(torch.optim.AdamW(trainable(model), lr=LR), k=2)

    data = batches(6, torch.float32)
    model = lora_mlp(torch.float32)
    base = make(model)
    perturbation = EFlatPerturbation(model, rho=RHO).attach(base)
    train(model, base, data[:3])
    saved = copy.deepcopy((model.state_dict(), base.state_dict()))
    train(model, base, data[3:])
    other = lora_mlp(torch.float32, seed=1)
    again = make(other)
    resumed = EFlatPerturbation(other, rho=RHO).attach(again)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(other, again, data[3:])
    assert_same_bits(resumed.averages, perturbation.averages)
    assert_same_bits(weights(other), weights(model))
    resumed.remove()
    assert "state_dict" not in vars(again) and "perturbation" not in again.state_dict()


def test_averages_from_before_attach_are_kept() -> None:
    for onto in ("A", "B", "both"):
        model = lora_mlp()
        first = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO, onto=onto)
        train(model, first, batches(3))
        perturbation = EFlatPerturbation(model, rho=RHO, onto=onto)
        perturbation.load_state_dict(first.perturbation.state_dict())
        perturbation.attach(torch.optim.SGD(trainable(model), lr=LR))
        assert_same_bits(perturbation.averages, first.averages)
        assert perturbation.steps == 3


def test_perturbations_of_two_models_attach_to_one_optimizer() -> None:
    """As for an actor and a critic; saved and loaded."""

    def make(seed: int) -> tuple[list[nn.Module], Any, list[EFlatPerturbation]]:
        models = [lora_mlp(seed=seed), lora_mlp(seed=seed + 1)]
        base = torch.optim.AdamW([p for m in models for p in trainable(m)], lr=LR)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return models, base, [EFlatPerturbation(m, rho=RHO).attach(base) for m in models]

    def step(models: list[nn.Module], base: Any, data: Any) -> None:
        for batch in data:
            base.zero_grad()
            sum(loss_of(model, batch) for model in models).backward()
            base.step()

    models, base, own = make(0)
    step(models, base, batches(3))
    saved = copy.deepcopy([m.state_dict() for m in models]), copy.deepcopy(base.state_dict())
    others, again, resumed = make(5)
    for model, state in zip(others, saved[0], strict=True):
        model.load_state_dict(state)
    again.load_state_dict(saved[1])
    for one, other in zip(own, resumed, strict=True):
        assert_same_bits(one.averages, other.averages)
    step(models, base, batches(2))
    step(others, again, batches(2))
    for one, other in zip(models, others, strict=True):
        assert_same_bits(weights(one), weights(other))
    own[0].remove()
    kept = [s for s in base.state_dict()["state"].values() if "perturbation_ema" in s]
    assert len(kept) == len(own[1].factors)


def test_a_refused_attach_ends_no_perturbation() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=LR, rho=RHO)
    perturbation = EFlatPerturbation(model, rho=RHO)
    head = [p for n, p in model.named_parameters() if "head" in n and p.requires_grad]
    with pytest.raises(ValueError, match="optimizer must train LoRA factors"):
        perturbation.attach(torch.optim.SGD(head, lr=LR))
    train(model, optimizer, batches(2))
    assert perturbation.attach(torch.optim.SGD(trainable(model), lr=LR)) is perturbation


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    """The scaler calls a fused AdamW even so, with ``found_inf`` set."""
    model = lora_mlp(torch.float32)
    base = torch.optim.AdamW(trainable(model), lr=LR, fused=True)
    perturbation = EFlatPerturbation(model, rho=RHO).attach(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for overflow in (False, True, False):
        base.zero_grad()
        scaler.scale(loss_of(model, batches(1, torch.float32)[0])).backward()
        if overflow:
            trainable(model)[0].grad[0, 0] = torch.inf
        before = {name: average.clone() for name, average in perturbation.averages.items()}
        scaler.step(base)
        scaler.update()
        assert all(torch.equal(before[n], a) == overflow for n, a in perturbation.averages.items())
    assert perturbation.steps == 2 and int(perturbation.skipped) == 0
