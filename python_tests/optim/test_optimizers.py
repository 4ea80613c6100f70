"""The optimizers are torch optimizers: groups, hooks, counters, schedules of rho."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from models import (
    CREATE,
    assert_same_bits,
    at_points,
    batches,
    lora_mlp,
    lora_weights,
    loss_of,
    same_bits,
    train_on,
    trainable,
    weights,
)
from torch import nn

from eflat_ext import (
    EFlatLoRA,
    FlatLoRA,
    LoRASAM,
    create_eflat_optimizer,
    create_flat_optimizer,
    reference,
)

UP, DOWN = "base_model.model.up.default", "base_model.model.down.default"


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, skip: int = 0
) -> None:
    train_on(model, optimizer, batches(skip + steps, next(model.parameters()).dtype)[skip:])


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
class TestAnyMethod:
    """Properties of all three methods."""

    def test_is_an_optimizer_over_all_trainable_parameters(self, create: Callable) -> None:
        model = lora_mlp()
        optimizer = create(model, torch.optim.AdamW, lr=0.5, weight_decay=0.25)
        assert isinstance(optimizer, torch.optim.Optimizer)
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(p) for p in trainable(model)]
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
        assert optimizer.param_groups is optimizer.base.param_groups
        assert optimizer.defaults is optimizer.base.defaults
        train(model, optimizer, 1)
        assert optimizer.state is optimizer.base.state and len(optimizer.state) == 6
        assert "rho=0.05" in repr(optimizer) and "AdamW" in repr(optimizer)

    def test_nothing_but_the_base_writes_weights(self, create: Callable) -> None:
        model = lora_mlp()
        optimizer = create(model, torch.optim.SGD, lr=0.1)
        train(model, optimizer)
        before, versions = weights(model), [p._version for p in model.parameters()]
        optimizer.train()
        clean = loss_of(model.eval(), batches(1)[0])
        loss_of(model.train(), batches(1)[0]).backward()
        if create is not create_eflat_optimizer:
            optimizer.first_step()
        loss = loss_of(model, batches(1)[0])
        assert not same_bits(loss, clean)  # it is the perturbed one
        loss.backward()
        optimizer.eval()
        assert_same_bits(weights(model), before)
        assert [p._version for p in model.parameters()] == versions

    def test_train_and_eval_are_the_bases(self, create: Callable) -> None:
        calls: list[str] = []

        class ScheduleFree(torch.optim.SGD):
            def train(self) -> None:
                calls.append("train")

            def eval(self) -> None:
                calls.append("eval")

        for base in (torch.optim.SGD, ScheduleFree):
            optimizer = create(lora_mlp(), base, lr=0.1)
            assert calls == []
            optimizer.train()
            optimizer.eval()
        assert calls == ["train", "eval"]

    def test_learning_rate_schedulers(self, create: Callable) -> None:
        model = lora_mlp()
        optimizer = create(model, torch.optim.SGD, lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "scheduler before optimizer.step"
            for _ in range(2):
                train(model, optimizer, 1)
                scheduler.step()
        assert optimizer.base.param_groups[0]["lr"] == 0.25

    def test_step_hooks_and_profiler(self, create: Callable) -> None:
        model = lora_mlp()
        optimizer = create(model, torch.optim.SGD, lr=0.1)
        calls: list[str] = []
        pre = optimizer.register_step_pre_hook(lambda o, a, k: calls.append("pre"))
        optimizer.register_step_post_hook(lambda o, a, k: calls.append("post"))
        with torch.profiler.profile() as profile:
            train(model, optimizer, 1)
        assert calls == ["pre", "post"]
        name = f"Optimizer.step#{type(optimizer).__name__}.step"
        assert name in {event.key for event in profile.key_averages()}
        pre.remove()
        train(model, optimizer, 1)
        assert calls == ["pre", "post", "post"]

    def test_groups_given_by_the_user(self, create: Callable) -> None:
        """Rates of LoRA+, groups without decay, named parameters."""
        model = lora_mlp(lora_bias=True)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        names_B = [n for n, _ in named if n.endswith("lora_B.default.weight")]
        groups = [
            {"params": [(n, p) for n, p in named if n in names_B], "lr": 1.0},
            {"params": [(n, p) for n, p in named if "lora_A" in n]},
            {"params": [(n, p) for n, p in named if "lora_A" not in n and n not in names_B]},
        ]
        optimizer = create(model, torch.optim.AdamW, params=groups, lr=0.25)
        assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25, 0.25]
        assert optimizer.param_groups[0]["param_names"] == names_B
        assert [pair.name for pair in optimizer.pairs] == [UP, DOWN]
        before = weights(model)
        train(model, optimizer, 1)
        assert all(not same_bits(p, before[n]) for n, p in named)

    def test_a_group_added_later_is_trained(self, create: Callable) -> None:
        model = lora_mlp()
        optimizer = create(model, torch.optim.SGD, lr=0.1)
        extra = nn.Parameter(torch.ones(3))
        extra.grad = torch.ones(3)
        optimizer.add_param_group({"params": [extra], "lr": 1.0})
        assert len(optimizer.param_groups) == 2
        loss_of(model, batches(1)[0]).backward()
        if create is not create_eflat_optimizer:
            optimizer.first_step(zero_grad=False)
            loss_of(model, batches(1)[0]).backward()
        optimizer.step()
        assert torch.equal(extra, torch.zeros(3))
        optimizer.zero_grad()
        assert extra.grad is None

    def test_a_step_without_any_gradient_of_a_pair(self, create: Callable) -> None:
        model = lora_mlp()
        optimizer = create(model, torch.optim.SGD, lr=1.0)
        head = next(p for n, p in model.named_parameters() if "modules_to_save" in n)
        head.grad = torch.ones_like(head)
        before = head.detach().clone()
        if create is not create_eflat_optimizer:
            optimizer.first_step(zero_grad=False)
        optimizer.step()
        assert torch.equal(head, before - 1)
        assert optimizer.perturbation_norms == {}
        assert int(optimizer.skipped_perturbations) == 0

    @pytest.mark.parametrize("first", CREATE.values(), ids=CREATE)
    @pytest.mark.parametrize("how", ["takes over", "removed", "dead"])
    def test_a_second_optimizer_takes_over(
        self, create: Callable, first: Callable, how: str
    ) -> None:
        """``remove_hooks`` is not needed."""
        runs = []
        for before in (True, False):
            model = lora_mlp()
            old = first(model, torch.optim.SGD, lr=0.0) if before else None
            if before:
                train(model, old)
            if before and how == "removed":
                old.remove_hooks()
            if how == "dead":
                old = None
                gc.collect()
            assert how == "takes over" or not any("forward" in vars(m) for m in model.modules())
            second = create(model, torch.optim.SGD, lr=0.1)
            train(model, second)
            runs.append(weights(model))
            if old is not None:
                with pytest.raises(RuntimeError, match=r"this perturbation has ended: (a ne|it w)"):
                    train(model, old, 1)
                assert_same_bits(weights(model), runs[0])
        assert_same_bits(*runs)

    def test_cannot_be_copied(self, create: Callable) -> None:
        optimizer = create(lora_mlp(), torch.optim.SGD, lr=0.1)
        for action in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="state_dict"):
                action(optimizer)

    def test_pairs_that_are_not_trained_are_named(self, create: Callable) -> None:
        model = lora_mlp()
        for parameter in (model.base_model.model.up.lora_A, model.base_model.model.up.lora_B):
            parameter.default.weight.requires_grad_(False)
        with pytest.warns(UserWarning, match=UP) as caught:
            optimizer = create(model, torch.optim.SGD, lr=0.1)
        assert len(caught) == 1
        assert [pair.name for pair in optimizer.pairs] == [DOWN]
        train(model, optimizer)
        assert list(optimizer.perturbation_norms) == [DOWN]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
    @pytest.mark.parametrize("norm_scope", ["layer", "global"])
    def test_a_bad_gradient_leaves_one_layer_unperturbed(
        self, create: Callable, norm_scope: str, bad: float
    ) -> None:
        model = lora_mlp()
        optimizer = create(model, torch.optim.SGD, lr=0.0, norm_scope=norm_scope)
        train(model, optimizer, 2)
        assert int(optimizer.skipped_perturbations) == 0
        averages = {k: v.clone() for k, v in getattr(optimizer, "averages", {}).items()}
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        up, down = optimizer.pairs
        if bad == 0.0:
            up.A.grad.zero_(), up.B.grad.zero_()
        else:
            up.B.grad[0, 0] = bad
        before = weights(model)
        if create is create_eflat_optimizer:
            optimizer.step()
            assert same_bits(optimizer.averages[UP], averages[UP])
            assert not same_bits(optimizer.averages[DOWN], averages[DOWN])
        else:
            optimizer.first_step()
            with at_points(optimizer):
                assert same_bits(up.B, before["base_model.model.up.lora_B.default.weight"])
                assert not same_bits(down.B, before["base_model.model.down.lora_B.default.weight"])
            loss_of(model, batches(1)[0]).backward()
            optimizer.second_step()
        assert int(optimizer.skipped_perturbations) == 1
        assert optimizer.skipped_perturbations.dtype == torch.int64
        norms = optimizer.perturbation_norms
        assert norms[DOWN] > 0 and not 0 < norms[UP] < math.inf


def test_constructors_take_an_existing_optimizer() -> None:
    for method in (EFlatLoRA, FlatLoRA, LoRASAM):
        model = lora_mlp()
        base = torch.optim.SGD(trainable(model), lr=0.1)
        assert method(model, base, rho=0.1).base is base


def test_step_returns_what_the_closure_does() -> None:
    for create in CREATE.values():
        model, values = lora_mlp(), iter([7.0, 8.0])
        optimizer = create(model, torch.optim.SGD, lr=0.1)
        assert optimizer.step(lambda values=values: next(values)) == 7.0


def test_rho_follows_a_schedule_of_completed_steps() -> None:
    seen: list[int] = []

    def rho(step: int) -> float:
        seen.append(step)
        return 0.0 if step < 3 else 0.1

    model, plain = lora_mlp(), lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=rho)
    base = torch.optim.SGD(trainable(plain), lr=0.1)
    train(model, optimizer, 3)
    train(plain, base, 3)
    # Steps at rho 0 are those of plain LoRA, bit for bit.
    assert_same_bits(weights(model), weights(plain))
    assert all(not average.any() for average in optimizer.averages.values())
    train(model, optimizer, 1, skip=3)
    assert set(seen) == {0, 1, 2, 3, 4}  # the groups show the coming step's
    assert [group["perturbation_rho"] for group in optimizer.param_groups] == [0.1]
    for pair in optimizer.pairs:
        reached = (pair.scaling * optimizer.averages[pair.name] @ pair.A).detach().norm()
        assert 0 < float(reached) <= 0.1 * 0.9 * (1 + 1e-2)
    optimizer.rho = lambda step: math.nan if step > 4 else 0.1
    train(model, optimizer, 1, skip=4)
    before = weights(model)
    with pytest.raises(ValueError, match="rho"):
        train(model, optimizer, 1, skip=5)
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_a_schedule_of_rho_may_end_with_the_last_step(onto: str) -> None:
    """It is called once for each step; one more step raises before any weight has changed."""
    radii = [0.1, 0.2, 0.3]
    options = {"lr": 0.1, "onto": onto, "rho": radii.__getitem__}
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, **options)
    train(model, optimizer)
    saved, before = optimizer.state_dict(), weights(model)
    other = lora_mlp()
    again = create_eflat_optimizer(other, torch.optim.SGD, **options)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    averages = {name: average.clone() for name, average in optimizer.averages.items()}
    for each, its_model in ((optimizer, model), (again, other)):
        with pytest.raises(IndexError):
            train(its_model, each, 1, skip=3)
        with pytest.raises(IndexError):
            each.rho = radii.__getitem__  # and what is assigned is asked at once
        assert_same_bits(weights(its_model), before)
        assert_same_bits(each.averages, averages)
        assert each.state_dict()["param_groups"] == saved["param_groups"]
    radii.append(0.4)
    for each, its_model in ((optimizer, model), (again, other)):
        train(its_model, each, 1, skip=3)
        name = f"{UP}.B" if onto == "both" else UP
        assert not same_bits(each.averages[name], averages[name])


def test_average_is_the_moving_average_of_perturbations() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=0.3, beta=0.25)
    expected = {name: torch.zeros_like(average) for name, average in optimizer.averages.items()}
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for pair in optimizer.pairs:
            with at_points(optimizer):
                A, B = pair.A.detach().clone(), pair.B.detach().clone()
            E, norm = reference.perturb(A, B, pair.A.grad, pair.B.grad, pair.scaling, 0.3)
            expected[pair.name] = 0.75 * expected[pair.name] + 0.25 * E
        optimizer.step()
        torch.testing.assert_close(optimizer.perturbation_norms[pair.name], norm)
        for name, average in optimizer.averages.items():
            torch.testing.assert_close(average, expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.proves("Plain loops", "an evaluation between backward and step changes nothing")
def test_an_evaluation_before_the_step_makes_no_difference() -> None:
    """E is computed from the factors at which the gradients were taken."""
    runs = []
    for evaluated in (False, True):
        model = lora_mlp()
        optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=0.01, rho=1.0)
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            if evaluated:
                model.eval()(batch[0])
                model.train()
            optimizer.step()
        runs.append((weights(model), optimizer.averages))
    assert_same_bits(runs[0][0], runs[1][0])
    assert_same_bits(runs[0][1], runs[1][1])


def test_the_user_is_told_when_nothing_was_perturbed() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
    model.eval()
    with pytest.warns(UserWarning, match=r"model.train\(\)") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    flat_model = lora_mlp().eval()
    with pytest.warns(UserWarning, match=r"model.train\(\)"):
        train(flat_model, create_flat_optimizer(flat_model, torch.optim.SGD, lr=0.1), 1)


def test_the_head_is_trained_but_not_perturbed() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1, rho=1.0)
    train(model, optimizer)
    heads = [m.base_model.model.head.modules_to_save["default"] for m in (model, lora_mlp())]
    assert not same_bits(heads[0].weight, heads[1].weight)
    perturbed, batch = copy.deepcopy(model), batches(1)[0]  # passes of a copy are not perturbed
    clean = loss_of(perturbed, batch)
    with torch.no_grad():
        for B, average in zip(lora_weights(perturbed), optimizer.averages.values(), strict=True):
            B.add_(average)
    assert same_bits(loss_of(model, batch), loss_of(perturbed, batch))
    assert not same_bits(loss_of(model, batch), clean)


def test_memory_is_one_tensor_per_target() -> None:
    """It is the average, or Flat-LoRA's perturbation; there is no copy of the weights."""

    def bytes_held(make: Callable) -> int:
        gc.collect()
        others = tensors()  # kept, so that no address is reused
        before = {t.untyped_storage().data_ptr() for t in others}
        model = lora_mlp(torch.float32)
        optimizer = make(model)
        train(model, optimizer, 2)
        optimizer.zero_grad()
        gc.collect()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        return sum(size for address, size in storages.items() if address not in before)

    def tensors() -> list[torch.Tensor]:
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        return [t for t in found if t.layout == torch.strided]

    targets = sum(p.nbytes for p in lora_weights(lora_mlp(torch.float32)))
    plain = bytes_held(lambda model: torch.optim.AdamW(trainable(model), lr=0.1))
    eflat = bytes_held(lambda model: create_eflat_optimizer(model, torch.optim.AdamW, lr=0.1))
    flat = bytes_held(lambda model: create_flat_optimizer(model, torch.optim.AdamW, lr=0.1))
    for each in (eflat, flat):
        assert targets <= each - plain <= targets + 64  # counter and norms
