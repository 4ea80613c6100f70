"""The newest perturbation of a model's weights takes over; a foreign optimizer's step ends it."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    CREATE,
    assert_same_bits,
    batches,
    lora_mlp,
    loss_of,
    train_on,
    trainable,
    weights,
)
from perturbed_case import Case, X, assert_nothing_in_place
from test_attachment import assert_nothing_attached
from torch import nn

from eflat_ext import EFlatLoRA, EFlatPerturbation

SGD = torch.optim.SGD
DATA = batches(8)


def step(model: nn.Module, optimizer: Any, batch: Any = DATA[0]) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def attached(model: nn.Module, params: Any = None, **options: Any) -> tuple[Any, Any]:
    optimizer = SGD(trainable(model) if params is None else params, lr=0.1)
    options = {"rho": 0.5, **options}
    return EFlatPerturbation(model, **options).attach(optimizer), optimizer


# A newer one of the same weights.


@pytest.mark.parametrize("older", CREATE)
@pytest.mark.parametrize("newer", CREATE)
def test_a_newer_optimizer_takes_over(newer: str, older: str) -> None:
    """As when a cell runs twice; training is as if there had been one optimizer."""
    models = []
    for twice in (True, False):
        model = lora_mlp()
        if twice:
            first = CREATE[older](model, torch.optim.AdamW, lr=0.1, rho=0.5)
            loss_of(model, DATA[0]).backward()
            if older != "eflat":
                first.first_step()
        optimizer = CREATE[newer](model, torch.optim.AdamW, lr=0.1, rho=0.5)
        train_on(model, optimizer, DATA[:4])
        if twice:
            before = weights(model)
            message = "this perturbation has ended: a newer perturbation of the same weights"
            with pytest.raises(RuntimeError, match=message):
                first.step()
            with pytest.raises(RuntimeError, match=message):
                train_on(model, first, DATA[:1])
            assert_same_bits(weights(model), before)
            train_on(model, optimizer, DATA[4:])  # the older one's errors did not affect it
        else:
            train_on(model, optimizer, DATA[4:])
        models.append(weights(model))
    assert_same_bits(*models)


def test_deleting_an_older_one_leaves_the_newer_one_alone() -> None:
    case = Case()
    older = case.perturbation
    case.perturbation = EFlatPerturbation(case.model)
    case.put(2.0)
    del older
    gc.collect()
    case.assert_runs_at(2.0, 2.0)
    case.perturbation.remove()
    assert_nothing_attached(case.model)


def test_creating_one_claims_nothing() -> None:
    """It takes over at its first training pass, update, or attach."""
    case = Case()
    newer = EFlatPerturbation(case.model)
    case.model.eval()(X)
    case.perturbation.check()
    newer.check()
    case.model.train()(X)
    with pytest.raises(RuntimeError, match="has taken over"):
        case.perturbation.check()
    case.assert_runs_clean()
    third = EFlatPerturbation(case.model)
    newer.check()
    third.update({})
    with pytest.raises(RuntimeError, match="has taken over"):
        newer.update()
    with pytest.raises(RuntimeError, match="has taken over"):
        newer.attach(SGD(trainable(case.model), lr=0.1))


def test_several_may_perturb_disjoint_weights() -> None:
    model = lora_mlp(modules_to_save=None)
    halves = [[p for n, p in model.named_parameters() if f"{x}.lora" in n] for x in ("up", "down")]
    with pytest.warns(UserWarning, match="not among the optimizer's parameters"):
        both = [attached(model, half) for half in halves]
    for _ in range(3):
        for _, optimizer in both:
            optimizer.zero_grad()
        loss_of(model, DATA[0]).backward()
        for _, optimizer in both:
            optimizer.step()
    other = lora_mlp(modules_to_save=None)
    whole, optimizer = attached(other)
    for _ in range(3):
        step(other, optimizer)
    assert_same_bits(weights(model), weights(other))
    averages = both[0][0].averages | both[1][0].averages
    assert_same_bits(averages, whole.averages)
    # One of all weights ends both, and one of half of the weights ends that of all.
    attached(model)
    for perturbation, _ in both:
        with pytest.raises(RuntimeError, match="has taken over"):
            perturbation.update()


# Another optimizer.


def test_another_optimizer_that_steps_perturbed_weights_ends_the_perturbation() -> None:
    """With one warning."""
    model = lora_mlp()
    optimizer = CREATE["eflat"](model, SGD, lr=0.1, rho=0.5)
    train_on(model, optimizer, DATA[:2])
    other = torch.optim.Adam(trainable(model), lr=0.1)
    with pytest.warns(UserWarning, match="not perturbed any more: Adam stepped weights") as caught:
        step(model, other)
    assert len(caught) == 1 and caught[0].filename == __file__
    plain = lora_mlp()
    plain.load_state_dict(model.state_dict())
    theirs = torch.optim.Adam(trainable(plain), lr=0.1)
    theirs.load_state_dict(copy.deepcopy(other.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in DATA[2:5]:
            step(model, other, batch)
            step(plain, theirs, batch)
    assert_same_bits(weights(model), weights(plain))
    with pytest.raises(RuntimeError, match="has ended: Adam stepped weights that it perturbs"):
        optimizer.step()
    assert_same_bits(weights(model), weights(plain))
    again = CREATE["eflat"](model, SGD, lr=0.1, rho=0.5)
    train_on(model, again, DATA[:2])
    assert all(average.any() for average in again.averages.values())


@pytest.mark.parametrize("case", ["without gradients", "other weights", "no perturbed factor"])
def test_an_optimizer_that_leaves_perturbed_weights_alone_ends_nothing(case: str) -> None:
    model = lora_mlp()
    optimizer = CREATE["eflat"](model, SGD, lr=0.1, rho=0.5)
    train_on(model, optimizer, DATA[:2])
    names = {"other weights": "head", "no perturbed factor": "lora_A"}
    params = [p for n, p in model.named_parameters() if names.get(case, "") in n]
    params = [p for p in params if p.requires_grad]
    other = torch.optim.Adam(params, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.zero_grad()
        if case != "without gradients":
            loss_of(model, DATA[2]).backward()
        other.step()
        train_on(model, optimizer, DATA[3:5])


class Around(torch.optim.Optimizer):
    """An optimizer that steps another and then the weights once more, as Lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


class Raises(SGD):
    """An optimizer whose first step raises, after which torch calls no hooks."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise MemoryError
        return super().step(closure)


def around_ours(model: nn.Module) -> tuple[Any, Any]:
    optimizer = CREATE["eflat"](model, SGD, lr=0.1, rho=0.5)
    return optimizer.perturbation, Around(optimizer)


def around_ours_of_two_gradients(model: nn.Module) -> tuple[Any, Any]:
    optimizer = CREATE["flat"](model, SGD, lr=0.1, rho=0.5)
    outer = Around(optimizer)
    step = outer.step

    def both(closure: Any = None) -> None:
        optimizer.first_step()
        loss_of(model, DATA[0]).backward()
        step()

    outer.step = both  # type: ignore[method-assign]
    return optimizer.perturbation, outer


def around_an_attached_one(model: nn.Module) -> tuple[Any, Any]:
    perturbation, optimizer = attached(model)
    return perturbation, Around(optimizer)


def within_ours(model: nn.Module) -> tuple[Any, Any]:
    optimizer = EFlatLoRA(model, Around(SGD(trainable(model), lr=0.1)), rho=0.5)
    return optimizer.perturbation, optimizer


def within_an_attached_one(model: nn.Module) -> tuple[Any, Any]:
    outer = Around(SGD(trainable(model), lr=0.1))
    return EFlatPerturbation(model, rho=0.5).attach(outer), outer


def attached_within(model: nn.Module) -> tuple[Any, Any]:
    """Attach to the inner optimizer."""
    outer = Around(SGD(trainable(model), lr=0.1))
    return EFlatPerturbation(model, rho=0.5).attach(outer.inner), outer


def after_a_step_that_raised(model: nn.Module) -> tuple[Any, Any]:
    optimizer = EFlatLoRA(model, Around(Raises(trainable(model), lr=0.1)), rho=0.5)
    loss_of(model, DATA[0]).backward()
    with pytest.raises(MemoryError):
        optimizer.step()
    return optimizer.perturbation, Around(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        around_ours,
        around_ours_of_two_gradients,
        around_an_attached_one,
        within_ours,
        within_an_attached_one,
        attached_within,
        after_a_step_that_raised,
    ],
)
def test_optimizers_around_and_within_do_not_end_it(make: Callable) -> None:
    model = lora_mlp()
    perturbation, optimizer = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in DATA[:3]:
            step(model, optimizer, batch)
    assert perturbation.steps == 3 + (make is after_a_step_that_raised)
    perturbation.check()
    with pytest.warns(UserWarning, match="Adam stepped weights"):  # a foreign optimizer still warns
        step(model, torch.optim.Adam(trainable(model), lr=0.1))
    with pytest.raises(RuntimeError, match="has ended"):
        step(model, optimizer)


# Removed.


@pytest.mark.parametrize("method", CREATE)
def test_removed_hooks_are_gone_for_good(method: str) -> None:
    """Passes are clean and ``step()`` raises, also after ``train()`` and ``eval()``."""
    model = lora_mlp()
    optimizer = CREATE[method](model, SGD, lr=0.1, rho=0.5)
    train_on(model, optimizer, DATA[:2])
    optimizer.remove_hooks()
    assert_nothing_attached(model)
    before = weights(model)
    optimizer.train()
    output = model(DATA[0][0])
    optimizer.eval()
    assert torch.equal(model(DATA[0][0]), output)
    with pytest.raises(RuntimeError, match="has ended: it was removed"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="has ended: it was removed"):
        train_on(model, optimizer, DATA[:1])
    assert_same_bits(weights(model), before)
    assert_nothing_in_place(model)
    train_on(model, CREATE[method](model, SGD, lr=0.1, rho=0.5), DATA[:2])


def test_a_wrapper_that_steps_ours_every_second_time_ends_nothing() -> None:
    class EverySecond(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.calls = inner, 0
            super().__init__(inner.param_groups, {})

        def step(self) -> None:
            self.calls += 1
            if self.calls % 2 == 0:
                self.inner.step()

    model = lora_mlp()
    optimizer = CREATE["eflat"](model, torch.optim.SGD, lr=0.1, rho=0.3)
    around = EverySecond(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(4):
            loss_of(model, batch).backward()
            around.step()
    assert optimizer.perturbation.steps == 2 and not optimizer.perturbation.ended
