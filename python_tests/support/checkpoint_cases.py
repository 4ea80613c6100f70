"""Functions that the tests of torch.distributed.checkpoint run on each rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from models import assert_same_bits, batches, lora_mlp, loss_of
from sharded_cases import (
    assert_same_on_all_ranks,
    named,
    optimizer_of,
    own_part,
    shard_model,
    train,
    whole,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

COUNTERS = ("perturbation_steps", "perturbation_skipped")


def everything(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return gathered weights, averages and moments."""
    tensors = named(model)
    tensors.update({f"average {n}": t for n, t in whole(optimizer.averages).items()})
    for index, state in enumerate(optimizer.state.values()):
        tensors.update(whole({f"{index} {name}": value for name, value in state.items()}))
    return tensors


def fresh(onto: str = "B") -> tuple[nn.Module, Any]:
    model = shard_model(lora_mlp(torch.float32, seed=3))
    return model, optimizer_of(model, onto=onto)


def save(folder: str, onto: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save within an accumulated step; return the state of now and of two steps later."""
    data = batches(6, torch.float32)
    model, optimizer = fresh(onto)
    train(model, optimizer, data[:4])
    now = everything(model, optimizer)
    optimizer.zero_grad()
    loss_of(model, own_part(data[4])).backward()
    weights, state = get_state_dict(model, optimizer)
    averages = {n: s["perturbation_ema"] for n, s in state["state"].items() if len(s) > 3}
    assert len(averages) == (4 if onto == "both" else 2)
    parameters = dict(model.named_parameters())
    for name, average in averages.items():  # whole on every rank, which they were not before
        assert type(average) is Tensor and average.shape == parameters[name].shape
    assert_same_on_all_ranks(averages)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, data[4:])
    return now, everything(model, optimizer)


def load(folder: str, onto: str, full: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the same from the file, on this number of ranks."""
    data = batches(6, torch.float32)
    model, optimizer = fresh(onto)
    weights, state = get_state_dict(model, optimizer)
    for group in optimizer.state_dict()["param_groups"]:
        assert [group[name] for name in COUNTERS] == [0, 0]
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    if full:  # and once more, from tensors that are whole
        options = StateDictOptions(full_state_dict=True)
        weights, state = get_state_dict(model, optimizer, options=options)
        for entry in state["state"].values():
            assert all(type(value) is Tensor for value in entry.values())
        model, optimizer = fresh(onto)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=state,
            options=options,
        )
    assert optimizer.state_dict()["param_groups"][0]["perturbation_steps"] == 4
    now = everything(model, optimizer)
    train(model, optimizer, data[4:])
    return now, everything(model, optimizer)


def state_before_the_first_step(method: str) -> None:
    """Check that torch's step to initialise the state, with zero gradients, does not count."""
    model = shard_model(lora_mlp())
    optimizer = optimizer_of(model, method)
    before = named(model)
    state = get_optimizer_state_dict(model, optimizer)
    assert [state["param_groups"][0][name] for name in COUNTERS] == [0, 0]
    assert int(optimizer.skipped_perturbations) == 0
    assert_same_bits(named(model), before)
    # A first step of warm-up has a learning rate of zero, too, but gradients: it counts.
    warm = shard_model(lora_mlp())
    optimizer = optimizer_of(warm, method, lr=0.0)
    train(warm, optimizer, batches(1))
    assert optimizer.state_dict()["param_groups"][0]["perturbation_steps"] == 1
    if method == "eflat":
        assert all(average.any() for average in whole(optimizer.averages).values())
