"""Optimizer checkpoints are complete, load with weights_only, and resume bit for bit."""

from __future__ import annotations

import copy
import io
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
    same_bits,
    train_on,
    trainable,
    weights,
)
from torch import Tensor

from eflat_ext import create_eflat_optimizer, create_flat_optimizer

BASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer_cls": torch.optim.AdamW, "lr": 1e-2},
    "sgd": {"optimizer_cls": torch.optim.SGD, "lr": 0.1, "momentum": 0.9},
    "plain sgd": {"optimizer_cls": torch.optim.SGD, "lr": 0.1},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def radius(step: int) -> float:
    return 0.05 + 0.01 * step


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.proves("Plain loops", "`state_dict` and `load_state_dict` resume bit-exact")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_resume_is_bit_exact(create: Callable, base: dict[str, Any], dtype: torch.dtype) -> None:
    data = batches(10, dtype)
    whole = lora_mlp(dtype)
    uninterrupted = create(whole, rho=radius, **base)
    train_on(whole, uninterrupted, data)

    first = lora_mlp(dtype)
    optimizer = create(first, rho=radius, **base)
    train_on(first, optimizer, data[:5])
    saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second = lora_mlp(dtype, seed=7)
    second.load_state_dict(saved["model"])
    resumed = create(second, rho=radius, **base)
    resumed.load_state_dict(saved["optimizer"])
    train_on(second, resumed, data[5:])

    assert_same_bits(weights(second), weights(whole))
    assert int(resumed.skipped_perturbations) == int(uninterrupted.skipped_perturbations)
    if create is create_eflat_optimizer:
        assert_same_bits(resumed.averages, uninterrupted.averages)
        assert all(average.any() for average in resumed.averages.values())


def test_resume_in_the_middle_of_accumulation() -> None:
    """Saved between two micro-batches; the perturbed point is that of before."""
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2)
    data = batches(6)
    train_on(model, optimizer, data[:3])
    optimizer.zero_grad()
    loss_of(model, data[3]).backward()
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    loss_of(model, data[4]).backward()
    optimizer.step()

    other = lora_mlp(seed=3)
    other.load_state_dict(saved["model"])
    resumed = create_eflat_optimizer(other, torch.optim.AdamW, lr=1e-2)
    resumed.load_state_dict(saved["optimizer"])
    for batch in data[3:5]:
        loss_of(other, batch).backward()
    resumed.step()
    assert_same_bits(weights(other), weights(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checkpoint_holds_the_base_state_averages_and_counters(dtype: torch.dtype) -> None:
    model = lora_mlp(dtype)
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=radius)
    train_on(model, optimizer, batches(3, dtype))
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    (group,) = state["param_groups"]
    assert group["perturbation_steps"] == 3 and group["perturbation_skipped"] == 0
    assert not {"rho", "perturbation_rho"} & group.keys()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    holders = [names[key] for key, entry in state["state"].items() if "perturbation_ema" in entry]
    assert holders == [n for n in names if "lora_B" in n]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for entry in state["state"].values():
        assert {"step", "exp_avg", "exp_avg_sq"} <= entry.keys()
        if "perturbation_ema" in entry:
            assert entry["perturbation_ema"].dtype == expected
    # The live groups show rho; they and the base's state have nothing of the rest.
    assert optimizer.param_groups[0]["perturbation_rho"] == radius(3)
    assert "perturbation_steps" not in optimizer.param_groups[0]
    assert not any("perturbation_ema" in entry for entry in optimizer.state.values())
    loads = torch.optim.AdamW(trainable(lora_mlp(dtype)), lr=1.0)
    loads.load_state_dict(through_a_file(state))
    assert loads.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_the_count_of_skipped_perturbations_is_kept(create: Callable) -> None:
    model = lora_mlp()
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    for p in trainable(model):
        p.grad = torch.zeros_like(p)
    if create is not create_eflat_optimizer:
        optimizer.first_step(zero_grad=False)
    optimizer.step()
    assert int(optimizer.skipped_perturbations) == 2
    other = lora_mlp()
    fresh = create(other, torch.optim.SGD, lr=0.1)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert int(fresh.skipped_perturbations) == 2


def test_averages_keep_their_dtype_and_memory() -> None:
    model = lora_mlp(torch.bfloat16)
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2)
    train_on(model, optimizer, batches(2, torch.bfloat16))
    state = through_a_file(optimizer.state_dict())
    live = optimizer.averages
    before = {name: average.clone() for name, average in live.items()}
    train_on(model, optimizer, batches(2, torch.bfloat16))
    optimizer.load_state_dict(state)
    assert all(optimizer.averages[name] is live[name] for name in live)
    assert_same_bits(live, before)
    assert all(average.dtype == torch.float32 for average in live.values())
    # Digits that bfloat16 lacks are restored.
    assert any(not same_bits(a, a.bfloat16().float()) for a in live.values())


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_a_plain_checkpoint_loads(create: Callable) -> None:
    plain = lora_mlp()
    base = torch.optim.AdamW(trainable(plain), lr=1e-3)
    train_on(plain, base, batches(2))
    model = lora_mlp()
    optimizer = create(model, torch.optim.AdamW, lr=1e-2)
    train_on(model, optimizer, batches(2))
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3
    for mine, its in zip(trainable(model), trainable(plain), strict=True):
        assert same_bits(optimizer.state[mine]["exp_avg"], base.state[its]["exp_avg"])
    assert optimizer.state_dict()["param_groups"][0]["perturbation_steps"] == 0
    assert not any(average.any() for average in getattr(optimizer, "averages", {}).values())


def test_another_methods_checkpoint_loads() -> None:
    model, other = lora_mlp(), lora_mlp()
    eflat = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1)
    train_on(model, eflat, batches(2))
    flat = create_flat_optimizer(other, torch.optim.SGD, lr=0.2)
    flat.load_state_dict(through_a_file(eflat.state_dict()))
    assert flat.param_groups[0]["lr"] == 0.1 and not flat.state
    assert flat.state_dict()["param_groups"][0]["perturbation_steps"] == 2


def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2)
    train_on(model, optimizer, batches(2))
    before = through_a_file(optimizer.state_dict())
    wide = lora_mlp(r=5)
    other = create_eflat_optimizer(wide, torch.optim.AdamW, lr=0.5)
    train_on(wide, other, batches(2))
    with pytest.raises(ValueError, match="perturbation_ema of shape"):
        optimizer.load_state_dict(other.state_dict())
    fewer = through_a_file(before)
    fewer["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(fewer)
    with pytest.raises(ValueError, match="2 perturbed factors, got 1, 1 of them of these: other"):
        optimizer.load_state_dict(_without_an_average(before))
    onto_A = create_eflat_optimizer(lora_mlp(), torch.optim.AdamW, lr=1e-2, onto="A")
    with pytest.raises(ValueError, match="got 2, 0 of them of these: perhaps by another onto"):
        optimizer.load_state_dict(onto_A.state_dict())
    broken = through_a_file(before)
    _averages_in(broken)[1][0, 0] = float("nan")
    with pytest.raises(ValueError, match="must have a finite perturbation_ema"):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, entry in before["state"].items():
        assert_same_bits(
            {k: v for k, v in after["state"][key].items() if isinstance(v, Tensor)}, entry
        )


def _averages_in(state: dict[str, Any]) -> list[Tensor]:
    entries = state["state"].values()
    return [entry["perturbation_ema"] for entry in entries if "perturbation_ema" in entry]


def _without_an_average(state: dict[str, Any]) -> dict[str, Any]:
    entries = dict(state["state"])
    key = next(key for key, entry in entries.items() if "perturbation_ema" in entry)
    entries[key] = {k: v for k, v in entries[key].items() if k != "perturbation_ema"}
    return {**state, "state": entries}


def test_a_factor_that_is_no_longer_trained_has_no_average_to_save() -> None:
    model = lora_mlp()
    optimizer = create_eflat_optimizer(model, torch.optim.SGD, lr=0.1)
    train_on(model, optimizer, batches(2))
    (first, *_) = (p for name, p in model.named_parameters() if "lora_B" in name)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not first]
    state = through_a_file(optimizer.state_dict())
    assert len(_averages_in(state)) == 1
    optimizer.load_state_dict(state)


def test_averages_stay_with_their_factors_where_a_group_is_extended_in_place() -> None:
    model = lora_mlp()
    bias = model.base_model.model.up.base_layer.bias
    factors = {name: [p for n, p in model.named_parameters() if name in n] for name in ("_A", "_B")}
    groups = [{"params": factors["_A"]}, {"params": factors["_B"]}]
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, params=groups)
    optimizer.param_groups[0]["params"].append(bias.requires_grad_())
    train_on(model, optimizer, batches(2))
    saved = through_a_file(optimizer.state_dict())
    assert [k for k, v in saved["state"].items() if "perturbation_ema" in v] == [3, 4]
    before = {name: average.clone() for name, average in optimizer.averages.items()}
    train_on(model, optimizer, batches(2))
    optimizer.load_state_dict(saved)
    assert_same_bits(optimizer.averages, before)


@pytest.mark.parametrize("onto", ["B", "A", "both"])
def test_loading_in_the_middle_of_a_step_restores_its_point(onto: str) -> None:
    model, batch = lora_mlp(), batches(1)[0]
    optimizer = create_eflat_optimizer(model, torch.optim.AdamW, lr=1e-2, rho=1.0, onto=onto)
    train_on(model, optimizer, batches(2))
    state, before = through_a_file(optimizer.state_dict()), weights(model)
    loss = loss_of(model, batch)
    assert not same_bits(loss, loss_of(copy.deepcopy(model), batch))
    for averages in optimizer.averages.values():
        averages.zero_()
    optimizer.load_state_dict(state)
    assert same_bits(loss_of(model, batch), loss)
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("create", CREATE.values(), ids=CREATE)
def test_state_dict_hooks_run(create: Callable) -> None:
    model = lora_mlp()
    optimizer = create(model, torch.optim.SGD, lr=0.1)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(state["mine"]))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["pre", 1, "post"]


def test_distributed_checkpoint_reads_and_writes_it() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, other = lora_mlp(), lora_mlp()
    optimizer, fresh = (
        create_eflat_optimizer(m, torch.optim.AdamW, lr=1e-2) for m in (model, other)
    )
    train_on(model, optimizer, batches(3))
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(other, fresh, state)
    assert_same_bits(fresh.averages, optimizer.averages)
    assert fresh.state_dict()["param_groups"][0]["perturbation_steps"] == 3
