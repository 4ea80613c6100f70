"""Passes by other methods than ``forward``, and passes recomputed in the backward pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import CREATE, Mlp, assert_same_bits, batches, weights
from peft import LoraConfig, get_peft_model
from perturbed_case import Case, X
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eflat_ext import create_eflat_optimizer, reference
from eflat_ext.lora import find_pairs

DATA = batches(4)


class TwoWays(Mlp):
    """A model with the same outputs by ``forward`` and by another method, as CLIP has."""

    def features(self, x: Tensor) -> Tensor:
        return Mlp.forward(self, x)


def two_ways() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], modules_to_save=["head"])
    return get_peft_model(TwoWays(), config).double().train()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], by: str = "features") -> Tensor:
    call = model if by == "forward" else model.base_model.model.features
    return nn.functional.cross_entropy(call(batch[0]), batch[1])


def by_evaluation(model: nn.Module, optimizer: Any) -> None:
    model.eval()(DATA[0][0])
    model.train()


def by_optimizer(model: nn.Module, optimizer: Any) -> None:
    optimizer.eval()


def by_merging(model: nn.Module, optimizer: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    model.unmerge_adapter()
    model.load_state_dict(before)  # without the rounding


def by_context(model: nn.Module, optimizer: Any) -> None:
    with optimizer.clean(), torch.no_grad():
        loss_of(model, DATA[0])


BETWEEN = [None, by_evaluation, by_optimizer, by_merging, by_context]


@pytest.mark.proves("Plain loops", "losses and evaluations by other methods than `forward`")
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_one_gradient(onto: str, between: Callable | None, set_to_none: bool, told: bool) -> None:
    """The steps equal those of ``forward``, with other readings of the weights in between."""
    runs = []
    for by in ("forward", "features"):
        model = two_ways()
        optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.01, rho=1.0, onto=onto)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in DATA:
                optimizer.zero_grad(set_to_none)
                for _ in range(2):  # micro-batches
                    if by == "features" and told:
                        optimizer.train()
                    loss_of(model, batch, by).backward()
                    if between is not None:
                        between(model, optimizer)
                optimizer.step()
        runs.append((weights(model), optimizer.averages))
    for one, other in zip(*runs, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("calls", ["closure", "two calls"])
@pytest.mark.parametrize("method", ["flat", "lora-sam"])
def test_two_gradients(method: str, calls: str, between: Callable | None) -> None:
    runs = []
    for by in ("forward", "features"):
        model = two_ways()
        optimizer = CREATE[method](model, torch.optim.AdamW, lr=0.01, rho=1.0)

        def closure(
            batch: tuple[Tensor, Tensor], by: str = by, model: Any = model, it: Any = optimizer
        ) -> None:
            it.zero_grad()
            loss_of(model, batch, by).backward()
            if between is not None:
                between(model, it)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in DATA:
                if calls == "closure":
                    optimizer.step(lambda batch=batch, closure=closure: closure(batch))
                else:
                    closure(batch)
                    optimizer.first_step()
                    closure(batch)
                    optimizer.second_step()
        runs.append(weights(model))
    assert_same_bits(*runs)


@pytest.mark.parametrize("dropped", ["first", "before backward"])
@pytest.mark.parametrize("mistake", ["eval mode", "clean"])
@pytest.mark.parametrize("method", CREATE)
def test_a_gradient_at_clean_weights_still_warns(method: str, mistake: str, dropped: str) -> None:
    """Trainer calls ``train`` before every micro-batch."""
    model = two_ways()
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=1.0)

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model, DATA[0], "forward").backward()

    optimizer.step(closure)
    if method != "eflat":
        closure()
        optimizer.first_step(zero_grad=False)
    if dropped == "first":
        optimizer.base.zero_grad()
    optimizer.train()
    model.train(mistake != "eval mode")
    with optimizer.clean() if mistake == "clean" else nullcontext():
        loss = loss_of(model, DATA[1], "forward" if mistake == "eval mode" else "features")
        optimizer.base.zero_grad()
        loss.backward()
    with pytest.warns(UserWarning, match="without the perturbation"):
        optimizer.step()


@pytest.mark.parametrize("method", CREATE)
def test_evaluations_by_other_methods_are_clean(method: str) -> None:
    model = two_ways()
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=1.0)
    features = model.base_model.model.features

    def backward() -> None:
        optimizer.zero_grad()
        loss_of(model, DATA[1], "forward").backward()

    optimizer.step(backward)
    expected = copy.deepcopy(model)(DATA[0][0])  # a copy runs as it is
    backward()
    if method != "eflat":
        optimizer.first_step()
        backward()
    before = weights(model)
    with torch.no_grad():
        assert not torch.equal(features(DATA[0][0]), expected)
        model.eval()
        assert torch.equal(features(DATA[0][0]), expected)
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("method", CREATE)
def test_a_layer_in_eval_mode_within_a_training_pass_runs_clean(method: str) -> None:
    """Its own mode decides, as for its dropout, with a warning."""
    model = two_ways()
    optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=1.0)

    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model, DATA[0]).backward()

    optimizer.step(closure)
    model.base_model.model.down.eval()
    if method != "eflat":
        closure()
        optimizer.first_step()
    points, other = optimizer.points(), copy.deepcopy(model)
    with torch.no_grad():
        for (name, parameter), copied in zip(
            model.named_parameters(), other.parameters(), strict=True
        ):
            if ".up." in name and parameter in points:
                copied.copy_(points[parameter])
    closure()
    loss_of(other, DATA[0]).backward()
    for parameter, copied in zip(model.parameters(), other.parameters(), strict=True):
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, copied.grad)
    if method != "eflat":
        optimizer.step()
        return
    averages = {name: average.clone() for name, average in optimizer.averages.items()}
    with pytest.warns(UserWarning, match=r"down\.default was taken without the perturbation"):
        optimizer.step()
    for pair in find_pairs(other):  # of the factors where each gradient was taken
        E, _ = reference.perturb(
            pair.A.detach(), pair.B.detach(), pair.A.grad, pair.B.grad, pair.scaling, 1.0
        )
        expected = 0.1 * averages[pair.name] + 0.9 * E
        torch.testing.assert_close(optimizer.averages[pair.name], expected, rtol=1e-8, atol=1e-12)


class Checkpointed(TwoWays):
    """A model that recomputes its layers in the backward pass."""

    reentrant = False

    def features(self, x: Tensor) -> Tensor:
        def layers(x: Tensor) -> Tensor:
            return torch.tanh(self.down(torch.tanh(self.up(x))))

        return self.head(checkpoint(layers, x, use_reentrant=self.reentrant))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


@pytest.mark.proves(
    "Plain loops", "gradient checkpointing, with an evaluation before the backward pass"
)
@pytest.mark.parametrize(
    "between",
    [
        "by_evaluation",
        "by_optimizer",
        "by_merging_alone",
        "by_context",
        "by_leaving_it_in_eval_mode",
    ],
)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", CREATE)
def test_what_is_computed_again_is_perturbed_as_it_was(
    method: str, reentrant: bool, between: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)
    found = []
    for cls, action in ((TwoWays, None), (Checkpointed, None), (Checkpointed, globals()[between])):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["up", "down"], modules_to_save=["head"])
        model = get_peft_model(cls(), config).double().train()
        optimizer = CREATE[method](model, torch.optim.SGD, lr=0.1, rho=1.0)

        def backward(batch: Any, then: Any = None, model: Any = model, it: Any = optimizer) -> None:
            it.zero_grad()
            x = batch[0].clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(x), batch[1])
            if then is not None:
                then(model, it)
            loss.backward()

        for batch in DATA[:3]:
            optimizer.step(lambda batch=batch, backward=backward: backward(batch))
        backward(DATA[3])
        if method != "eflat":
            optimizer.first_step()
        backward(DATA[3], action)
        optimizer.step()
        found.append(weights(model))
    for name, expected in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-12, atol=1e-14)


def by_leaving_it_in_eval_mode(model: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        model.eval()(DATA[0][0])


def by_merging_alone(model: nn.Module, optimizer: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def test_a_clean_pass_stays_clean_when_it_is_recomputed() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["up", "down"], modules_to_save=["head"])
    model = get_peft_model(Checkpointed(), config).double().train()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=1.0)
    for batch in DATA:
        optimizer.zero_grad()
        loss_of(model, batch, "forward").backward()
        optimizer.step()
    optimizer.zero_grad()
    with optimizer.clean():
        loss = loss_of(model, DATA[0], "forward")
    loss.backward()  # recomputed outside the context
    found = model.base_model.model.up.lora_B["default"].weight.grad.clone()
    optimizer.remove_hooks()
    optimizer.zero_grad()
    loss_of(model, DATA[0], "forward").backward()
    assert torch.equal(found, model.base_model.model.up.lora_B["default"].weight.grad)


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_pass_tells_whether_it_was_perturbed(training: bool) -> None:
    """From that a step knows the point of its gradients."""
    torch._dynamo.reset()
    case = Case()
    run = torch.compile(case.model.train(training), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        case.perturbation.forget_passes()
        run(X).sum().backward()
        assert {factor.ran_perturbed for factor in case.perturbation.factors} == {training}
        case.assert_clean()
