"""EFlatLoRA's fused operator takes the steps of the unfused path, and only where it applies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import (
    assert_same_bits,
    batches,
    lora_mlp,
    lora_weights,
    loss_of,
    relative_error,
    same_bits,
    train_on,
    trainable,
    weights,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from eflat_ext import EFlatLoRA, create_eflat_optimizer
from eflat_ext.ops.no_kernel import has_kernel

pytestmark = pytest.mark.skipif(
    not has_kernel("foreach_adamw_step_", torch.device("cpu")),
    reason="about the fused operator's kernel, which this build does not have",
)
STEPS = 20
RTOL = 1e-5  # as in test_trajectories.py


class FusedSteps(TorchDispatchMode):
    """Count calls of the fused operator and of the unfused one within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = self.unfused = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.fused += func is torch.ops.eflat.foreach_adamw_step_.default
        self.unfused += func is torch.ops.eflat.foreach_perturb_ema_.default
        return func(*args, **(kwargs or {}))


def counted(model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    with FusedSteps() as steps:
        train_on(model, optimizer, data)
    return steps.fused, steps.unfused


def run(
    fused_step: bool,
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    prepare: Callable[[nn.Module, EFlatLoRA], None] | None = None,
    **options: Any,
) -> tuple[nn.Module, EFlatLoRA, int]:
    """Return a model after some steps, its optimizer, and the number of fused steps."""
    model = lora_mlp(dtype)
    options = {"lr": 1e-2, "rho": 0.1, "beta": 0.7, "rtol": RTOL, **options}
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, fused_step=fused_step, **options)
    data = batches(steps, dtype)
    train_on(model, optimizer, data[:1])  # in which AdamW creates its state
    if prepare is not None:
        prepare(model, optimizer)
    fused, unfused = counted(model, optimizer, data[1:])
    assert fused + unfused == steps - 1
    return model, optimizer, fused


def difference(one: tuple[nn.Module, EFlatLoRA, int], other: tuple[nn.Module, EFlatLoRA, int]):
    """Return the largest relative difference between two runs' weights and averages."""
    of_averages = [
        float((x - y).norm() / y.norm())
        for x, y in zip(one[1].averages.values(), other[1].averages.values(), strict=True)
    ]
    return max(relative_error(one[0], other[0]), *of_averages)


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ["B", "A", "both"])
@pytest.mark.parametrize(
    "adamw", [{"weight_decay": 0.0}, {"foreach": True}, {"foreach": False}, {"fused": True}]
)
def test_fused_and_unfused_trajectories_agree(
    adamw: dict[str, Any], onto: str, norm_scope: str
) -> None:
    """With every implementation of AdamW."""
    options = {"onto": onto, "norm_scope": norm_scope, "weight_decay": 0.1, **adamw}
    fused, unfused = run(True, **options), run(False, **options)
    assert (fused[2], unfused[2]) == (STEPS - 1, 0)  # so equal bits would still be two paths
    # The factor that bounds an average onto A is a float32 number.
    assert difference(fused, unfused) <= (1e-7 if onto == "A" else 1e-9)


@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_fused_and_unfused_trajectories_agree_in_float32(onto: str) -> None:
    options = {"dtype": torch.float32, "onto": onto, "rtol": 1e-3, "lr": 1e-3}
    fused, unfused = run(True, **options), run(False, **options)
    assert fused[2] == STEPS - 1
    assert difference(fused, unfused) <= (1e-4 if onto == "B" else 1e-2)


def test_bfloat16_is_trained_with_float32_arithmetic() -> None:
    model, _, fused = run(True, torch.bfloat16, lr=1e-3)
    assert fused == STEPS - 1
    reference = run(True, torch.float64, lr=1e-3)[0]
    for mine, its in zip(trainable(model), trainable(reference), strict=True):
        assert float((mine.double() - its).detach().norm() / its.detach().norm()) <= 0.1


@pytest.mark.parametrize("on_base", [False, True])
def test_groups_and_schedules_of_rates_and_betas_are_followed(on_base: bool) -> None:
    """Rates of LoRA+, a group without decay, and a scheduler, which wraps ``step``."""

    def go(fused_step: bool) -> tuple[nn.Module, EFlatLoRA, int]:
        model = lora_mlp()
        B = lora_weights(model, "B")
        others = [p for p in trainable(model) if not any(p is b for b in B)]
        groups = [
            {"params": B, "lr": 0.04, "weight_decay": 0.0, "betas": (0.4, 0.99), "eps": 1e-4},
            {"params": others},
        ]
        optimizer = create_eflat_optimizer(
            model, torch.optim.AdamW, lr=0.01, params=groups, fused_step=fused_step, rtol=RTOL
        )
        owner = optimizer.base if on_base else optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(owner, [0.04, 0.01], STEPS)
        calls = 0
        for batch in batches(STEPS):
            calls += counted(model, optimizer, [batch])[0]
            schedule.step()
        return model, optimizer, calls

    fused, unfused = go(True), go(False)
    assert (fused[2], unfused[2]) == (STEPS - 1, 0)
    assert 0 < difference(fused, unfused) <= 1e-9


# Where it does not apply.


class OwnAdamW(torch.optim.AdamW):
    """A user's subclass."""


def in_every_group(**changed: Any) -> Callable[[nn.Module, EFlatLoRA], None]:
    def change(model: nn.Module, optimizer: EFlatLoRA) -> None:
        for group in optimizer.param_groups:
            group.update(changed)

    return change


def freeze(model: nn.Module, optimizer: EFlatLoRA) -> None:
    optimizer.pairs[0].A.requires_grad_(False)
    optimizer.pairs[0].A.grad = None


def switch_off(model: nn.Module, optimizer: EFlatLoRA) -> None:
    optimizer.fused_step = False


def share_step(model: nn.Module, optimizer: EFlatLoRA) -> None:
    """Share one step tensor among all factors, which each of them raises, as in AdamW."""
    one, other = optimizer.pairs[0].A, optimizer.pairs[1].B
    optimizer.state[one]["step"] = optimizer.state[other]["step"]


def patch_step(model: nn.Module, optimizer: EFlatLoRA) -> None:
    plain = optimizer.base.step
    optimizer.base.step = lambda: plain()  # type: ignore[method-assign]


def change_state(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def prepare(model: nn.Module, optimizer: EFlatLoRA) -> None:
        state = optimizer.state[optimizer.pairs[0].B]
        state[name] = change(state[name])

    return prepare


@pytest.mark.parametrize(
    "prepare",
    {
        "switched off": switch_off,
        "amsgrad": None,
        "maximize": in_every_group(maximize=True),
        "decay in the gradient": in_every_group(decoupled_weight_decay=False, weight_decay=0.1),
        "differentiable": in_every_group(differentiable=True),
        "rate in a tensor": in_every_group(lr=torch.tensor(0.01), foreach=False),
        "frozen": freeze,
        "step patched": patch_step,
        "step shared": share_step,
        "step in float64": change_state("step", Tensor.double),
        "strided moment": change_state("exp_avg", lambda t: t.T.contiguous().T),
    }.items(),
    ids=lambda item: item[0],
)
def test_the_unfused_path_is_taken(prepare: tuple[str, Callable | None]) -> None:
    """The bits are those of an optimizer that never fuses."""
    name, change = prepare
    options = {"amsgrad": True} if name == "amsgrad" else {}
    one, other = (run(fused, steps=4, prepare=change, **options) for fused in (True, False))
    assert (one[2], other[2]) == (0, 0)
    assert_same_bits(weights(one[0]), weights(other[0]))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, OwnAdamW])
def test_other_optimizers_take_the_unfused_path(base: type) -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, base, lr=0.01)
    assert counted(model, optimizer, batches(3)) == (0, 3)


def test_a_factor_of_two_pairs_takes_the_unfused_path() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).square().sum() + self.other(x).square().sum()

    for tied in (False, True):
        model = get_peft_model(Twins(), LoraConfig(r=2, target_modules=["one", "other"])).train()
        if tied:
            twins = model.base_model.model
            twins.one.lora_A["default"].weight = twins.other.lora_A["default"].weight
        optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.01)
        assert len(optimizer.pairs) == 2
        with FusedSteps() as steps:
            for _ in range(3):
                optimizer.step(lambda model=model: model(torch.ones(3, 6)).backward())
        assert (steps.fused, steps.unfused) == ((0, 3) if tied else (2, 1))


def test_factors_that_are_not_contiguous_take_the_unfused_path() -> None:
    model = lora_mlp()
    module = model.base_model.model.up.lora_B["default"]
    module.weight = nn.Parameter(torch.randn(4, 16, dtype=torch.float64).T)
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.1)
    assert counted(model, optimizer, batches(3)) == (0, 3)


# Other parts of a step.


def test_other_parameters_and_pairs_left_out_are_stepped_too() -> None:
    """The head, and a pair whose scaling is zero, with gradients from elsewhere and no average."""
    runs = []
    for fused_step in (True, False):
        model = lora_mlp()
        optimizer = create_eflat_optimizer(
            model, torch.optim.AdamW, lr=0.01, rtol=RTOL, fused_step=fused_step
        )
        train_on(model, optimizer, batches(3))
        before = weights(model)
        pair = optimizer.pairs[1]
        pair.layer.scaling[pair.adapter] = 0.0
        data = batches(4)[3:]
        loss = loss_of(model, data[0]) + pair.A.square().sum() + pair.B.sum()
        optimizer.zero_grad()
        loss.backward()
        with FusedSteps() as steps:
            optimizer.step()
        assert (steps.fused, steps.unfused) == (fused_step, not fused_step)
        moved = weights(model)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(not same_bits(moved[n], before[n]) for n in names)
        assert {int(optimizer.state[p]["step"]) for p in trainable(model)} == {4}
        assert list(optimizer.perturbation_norms) == [optimizer.pairs[0].name]
        runs.append(model)
    assert relative_error(*runs) <= 1e-9


@pytest.mark.parametrize("of_all_optimizers", [False, True])
def test_step_hooks_see_every_gradient(of_all_optimizers: bool) -> None:
    """Hooks of the base's step prevent fusing; hooks of all optimizers' steps do not.

    The latter run once, around the whole step.
    """
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.01)
    train_on(model, optimizer, batches(1))
    seen: list[tuple[object, int]] = []

    def hook(stepped: torch.optim.Optimizer, *_: object) -> None:
        seen.append((stepped, sum(p.grad is not None for p in trainable(model))))

    registers = [optimizer.base.register_step_pre_hook, optimizer.base.register_step_post_hook]
    if of_all_optimizers:
        registers = [register_optimizer_step_pre_hook, register_optimizer_step_post_hook]
    handles = [register(hook) for register in registers]
    with FusedSteps() as steps:
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    for handle in handles:
        handle.remove()
    assert (steps.fused, steps.unfused) == ((3, 0) if of_all_optimizers else (0, 3))
    stepped = optimizer if of_all_optimizers else optimizer.base
    assert seen == [(stepped, len(trainable(model)))] * 6
    assert counted(model, optimizer, batches(2)) == (2, 0)
    assert len(seen) == 6


@pytest.mark.parametrize("modules_to_save", [["head"], None])
@pytest.mark.parametrize("fused_step", [True, False])
def test_a_step_is_one_step_in_the_profile(fused_step: bool, modules_to_save: list | None) -> None:
    """The base's step is a part of it, not one of its own."""
    model = lora_mlp(modules_to_save=modules_to_save)
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.01, fused_step=fused_step)
    train_on(model, optimizer, batches(1))
    with torch.profiler.profile() as profile:
        train_on(model, optimizer, batches(3)[1:])
    counts = {event.key: event.count for event in profile.key_averages()}
    operator = "foreach_adamw_step_" if fused_step else "foreach_perturb_ema_"
    steps = {name: count for name, count in counts.items() if name.startswith("Optimizer.step#")}
    assert (steps, counts[f"eflat::{operator}"]) == ({"Optimizer.step#EFlatLoRA.step": 2}, 2)


@pytest.mark.parametrize("gradients", ["perturbed", "perturbed, then evaluated", "clean"])
@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_a_step_equals_one_of_the_base_and_leaves_the_gradients(onto: str, gradients: str) -> None:
    """It starts from the current weights, which no pass has written."""
    runs = []
    for fused_step in (True, False):
        model = lora_mlp()
        optimizer = create_eflat_optimizer(
            model, torch.optim.AdamW, lr=0.01, rho=1.0, onto=onto, rtol=RTOL, fused_step=fused_step
        )
        train_on(model, optimizer, batches(2))
        optimizer.zero_grad()
        batch = batches(3)[2]
        clean_loss = loss_of(model.eval(), batch)
        model.train(gradients != "clean")
        loss = loss_of(model, batch)
        assert same_bits(loss, clean_loss) == (gradients == "clean")
        loss.backward()
        model.train()
        if gradients == "perturbed, then evaluated":
            model.eval()(batches(1)[0][0])
        kept = {p: (p.grad, p.grad.clone()) for p in trainable(model)}
        copies = [p.detach().clone() for p in kept]
        plain = torch.optim.AdamW(copies)
        plain.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
        for one, p in zip(copies, kept, strict=True):
            one.grad = p.grad
        plain.step()
        warned = pytest.warns(UserWarning, match="without the perturbation")
        with warned if gradients == "clean" else nullcontext(), FusedSteps() as steps:
            optimizer.step()
        assert (steps.fused, steps.unfused) == (fused_step, not fused_step)
        assert all(p.grad is g and same_bits(g, old) for p, (g, old) in kept.items())
        for one, p in zip(copies, kept, strict=True):
            torch.testing.assert_close(one, p.detach(), rtol=1e-9, atol=1e-12)
        runs.append((model, optimizer, 0))
    assert difference(*runs) <= (1e-7 if onto == "A" else 1e-9)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["operator", "base"])
def test_training_goes_on_after_an_exception_within_a_step(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, _ = run(True, steps=3, rho=1.0)
    clean, state = weights(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    loss_of(model, batches(4)[3]).backward()

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if where == "operator":
            patch.setattr(torch.ops.eflat, "foreach_adamw_step_", fail)
        else:
            patch.setattr(torch.optim.AdamW, "step", fail)
        with pytest.raises(error):
            optimizer.step()
    assert all(p.grad is not None for p in trainable(model))
    if where == "operator":
        assert_same_bits(weights(model), clean)
        for key, entry in optimizer.state_dict()["state"].items():
            assert_same_bits(entry, state["state"][key])
    else:  # the pairs have taken their step, as documented; nothing else has
        moved = {n for n, p in weights(model).items() if not same_bits(p, clean[n])}
        assert moved == {n for n in clean if "lora_" in n}
    train_on(model, optimizer, batches(2))  # and it goes on


# Checkpoints.


@pytest.mark.parametrize("first", [True, False])
def test_state_loads_across_both_paths(first: bool) -> None:
    model, optimizer, _ = run(first, steps=6, fused=True)
    other_model, other, _ = run(not first, steps=6, fused=True)
    state, same = optimizer.state_dict(), other.state_dict()
    assert state["param_groups"] == same["param_groups"]
    assert state["state"].keys() == same["state"].keys()
    for key, entry in state["state"].items():
        assert list(entry) == list(same["state"][key])
        for name, value in entry.items():
            expected = same["state"][key][name]
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
            torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(state))
    data = batches(10)[6:]
    assert counted(model, optimizer, data) == ((4, 0) if first else (0, 4))
    assert counted(other_model, other, data) == ((0, 4) if first else (4, 0))
    assert difference((model, optimizer, 0), (other_model, other, 0)) <= 1e-9
