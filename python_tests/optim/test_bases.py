"""Base optimizers of other packages, and wrappers that forward an optimizer's attributes."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import bases
import numpy as np
import pytest
import pytorch_optimizer
import torch
import torch.distributed as dist
from eflat_case import CLOSE, LR, RHO, eflat, train
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
from torch import Tensor, nn
from torch.func import functional_call

from eflat_ext import EFlatLoRA, EFlatPerturbation, create_eflat_optimizer


@pytest.mark.proves("Plain loops", "schedule-free bases")
@pytest.mark.parametrize("rho", [0.0, RHO])
@pytest.mark.parametrize("package", ["schedulefree", "pytorch_optimizer"])
def test_schedule_free_bases(package: str, rho: float) -> None:
    """At rho 0 the bits are the base's; else gradients are those of the perturbed point."""
    name = "AdamWScheduleFree" if package == "schedulefree" else "ScheduleFreeAdamW"
    base = getattr(importlib.import_module(package), name)
    model, other = lora_mlp(), lora_mlp()
    optimizer = create_eflat_optimizer(model, base, lr=LR, rho=rho)
    plain = base(trainable(other), lr=LR)
    for batch in batches(5):
        for one in (optimizer, plain):
            one.train()
            one.zero_grad()
        point = optimizer.points()
        values = {n: point.get(p, p).detach() for n, p in model.named_parameters()}
        leaves = {n: values[n].clone().requires_grad_() for n, p in model.named_parameters()}
        loss_of(model, batch).backward()
        expected = functional_call(model, leaves, (batch[0],))
        nn.functional.cross_entropy(expected, batch[1]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, leaves[name].grad, **CLOSE)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()  # schedulefree's writes to gradients
        plain.step()
        optimizer.eval(), plain.eval()
        assert_same_bits(weights(model), weights(other))


@pytest.fixture(scope="module")
def a_process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make a group of one process, which DeMo and DistributedMuon ask for."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trajectory(name: str, way: str, closures: bool) -> list[dict[str, Tensor]]:
    """Return the weights after each of three steps, by a class itself or as a base at rho 0."""
    model = lora_mlp(torch.float32)
    torch.manual_seed(2)  # some draw random numbers
    np.random.seed(2)
    base = optimizer = bases.create(name, model)
    perturbation = None
    if way == "base":
        optimizer = EFlatLoRA(model, base, rho=0.0, fused_step=False)
        perturbation = optimizer.perturbation
    elif way == "attached":
        perturbation = EFlatPerturbation(model, rho=0.0).attach(base)
    getattr(optimizer, "train", lambda: None)()
    found = []
    for step, batch in enumerate(batches(3, torch.float32)):

        def loss(batch: Any = batch, scale: float = 10.0**step) -> Tensor:
            return scale * loss_of(model, batch)  # some step by the trend of the loss

        closure = bases.closure_of(name, optimizer, loss)
        if closures:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        found.append(weights(model))
    if perturbation is not None:
        assert not perturbation.ended and perturbation.steps == 3
    return found


@pytest.mark.proves(
    "Plain loops",
    "every optimizer of torch.optim and pytorch_optimizer as a base: its own bits at rho 0",
)
@pytest.mark.usefixtures("a_process_group")
@pytest.mark.filterwarnings("ignore", "error:.*perturb")
@pytest.mark.parametrize("name", sorted(bases.CLASSES.keys() - bases.REFUSED.keys()))
def test_every_optimizer_is_itself_at_rho_0(name: str) -> None:
    start = weights(lora_mlp(torch.float32))
    for closures in (False, True) if name not in bases.NEED_A_LOSS else (True,):
        plain = trajectory(name, "plain", closures)
        assert any(not torch.equal(w[n], start[n]) for w in plain for n in start)
        for way in ("base", "attached"):
            for step, expected in zip(trajectory(name, way, closures), plain, strict=True):
                assert_same_bits(step, expected)


@pytest.mark.parametrize("closures", [False, True])
def test_a_base_whose_step_calls_that_of_its_parent_updates_once(closures: bool) -> None:
    """torch runs the hooks of both steps once there has been an instance of the parent."""

    class Child(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    runs = []
    for way, cls in (("base", torch.optim.SGD), ("base", Child), ("attached", Child)):
        model = lora_mlp()
        optimizer = base = cls(trainable(model), lr=LR)
        if way == "attached":
            perturbation = EFlatPerturbation(model, rho=RHO).attach(base)
        else:
            optimizer = EFlatLoRA(model, base, rho=RHO)
            perturbation = optimizer.perturbation
        train(model, optimizer, batches(3), closures)
        assert perturbation.steps == 3
        runs.append(weights(model))
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


@pytest.mark.parametrize("name", bases.REFUSED)
def test_what_cannot_be_a_base_is_refused_with_the_reason(name: str) -> None:
    model = lora_mlp()
    base, reason = bases.create(name, model), bases.REFUSED[name]
    create = [lambda: EFlatLoRA(model, base)]
    create += [lambda: EFlatPerturbation(model).attach(base)]
    if name in bases.REFUSE_DENSE_GRADIENTS:  # it is the step that raises
        loss_of(model, batches(1)[0]).backward()
        create = [lambda make=make: (make(), base.step()) for make in create]
    for make in create:
        with pytest.raises((TypeError, RuntimeError), match=reason):
            make()


@pytest.mark.parametrize("wrapper", ["Lookahead", "Magma"])
def test_bases_with_a_state_dict_of_their_own_resume(wrapper: str) -> None:
    cls = getattr(pytorch_optimizer, wrapper)

    def make(model: nn.Module) -> Any:
        base = cls(torch.optim.AdamW(trainable(model), lr=LR))
        return EFlatLoRA(model, base, rho=RHO)

    model = lora_mlp()
    optimizer, data = make(model), batches(6)
    train_on(model, optimizer, data[:3])
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    torch.manual_seed(1)
    train_on(model, optimizer, data[3:])
    other = lora_mlp(seed=1)
    again = make(other)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.manual_seed(1)
    train_on(other, again, data[3:])
    assert_same_bits(weights(other), weights(model))
    assert_same_bits(again.averages, optimizer.averages)
    assert again.perturbation.steps == 6


def test_what_others_look_up_on_the_base_is_found() -> None:
    from transformers.optimization import Adafactor, AdafactorSchedule

    model = lora_mlp(torch.float32)
    optimizer = create_eflat_optimizer(model, Adafactor, rho=RHO)
    train_on(model, optimizer, batches(1, torch.float32))
    assert all(rate > 0 for rate in AdafactorSchedule(optimizer).get_lr())
    with pytest.raises(AttributeError, match="nonsense"):
        optimizer.nonsense  # noqa: B018


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_of_all_optimizers_run_once_a_step(fused: bool) -> None:
    from torch.optim.optimizer import (
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    model, seen = lora_mlp(), []
    optimizer = eflat(model, torch.optim.AdamW, fused_step=fused)
    optimizer.base.register_step_pre_hook(lambda *a: seen.append("base")) if not fused else None
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("before", o))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("after", o))),
    ]
    try:
        train_on(model, optimizer, batches(1))
        base = [] if fused else ["base"]
        assert seen == [("before", optimizer), *base, ("after", optimizer)]
        from lora_layers import Calls

        with Calls() as calls:
            train_on(model, optimizer, batches(1))
        assert ("foreach_adamw_step_" in calls.names) == fused
    finally:
        for handle in handles:
            handle.remove()


def wrapped(optimizer: Any) -> Any:
    """Return a wrapper that forwards reads of attributes and not writes."""

    class Wrapper:
        def __init__(self, inner: Any) -> None:
            own = {k: v for k, v in vars(inner).items() if k not in ("step", "zero_grad")}
            self.__dict__.update(own)
            name = f"Wrapped{type(inner).__name__}"
            self.__class__ = type(name, (Wrapper, type(inner)), {})
            self._inner = inner

        def step(self, closure: Any = None) -> Any:
            return self._inner.step(closure)

    return Wrapper(optimizer)


@pytest.mark.parametrize("method", CREATE)
def test_wrappers_that_forward_reads_and_not_writes_step_as_without(method: str) -> None:
    runs = []
    for wrap in (lambda o: o, wrapped):
        model = lora_mlp()
        optimizer = wrap(CREATE[method](model, torch.optim.SGD, lr=LR, rho=0.1))
        optimizer.rho = RHO
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batch in batches(4):
                optimizer.zero_grad()
                loss_of(model, batch).backward()
                if method == "eflat":
                    optimizer.step()
                else:
                    optimizer.first_step(zero_grad=True)
                    loss_of(model, batch).backward()
                    optimizer.second_step()
        assert optimizer.rho == RHO == optimizer.param_groups[0]["perturbation_rho"]
        runs.append(weights(model))
    assert_same_bits(*runs)
