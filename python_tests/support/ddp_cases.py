"""Functions that the tests of DistributedDataParallel run on each rank."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import assert_same_bits, batches, lora_gpt2, lora_mlp, loss_of
from sharded_cases import (
    assert_same_on_all_ranks,
    errors_against,
    named,
    one_process,
    optimizer_of,
    own_part,
    train,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Count the collective operations within the context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


def against_one_process(
    method: str, steps: int = 20, config: Any = None, wrapped: bool = False, **options: Any
) -> dict[str, float]:
    """Return errors after some steps; check equal bits on all ranks without more communication."""
    config = config or {}
    one, single = one_process(method, steps, config, **options)
    model = lora_mlp(**config)
    net = DistributedDataParallel(model)
    optimizer = optimizer_of(net if wrapped else model, method, **options)
    data = batches(steps)
    train(net, optimizer, data[:3])  # DDP rebuilds its buckets in the first steps
    with Collectives() as ours:
        train(net, optimizer, data[3:6])
    train(net, optimizer, data[6:])
    assert_same_on_all_ranks(named(model))
    if method == "eflat":
        assert_same_on_all_ranks(optimizer.averages)
        names = {parameter: name for name, parameter in model.named_parameters()}
        points = optimizer.points()
        assert any(not torch.equal(point, parameter) for parameter, point in points.items())
        assert_same_on_all_ranks({names[parameter]: point for parameter, point in points.items()})
    errors = errors_against(model, optimizer, one, single)
    plain = lora_mlp(**config)
    net = DistributedDataParallel(plain)
    base = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    train(net, base, data[:3])
    with Collectives() as theirs:
        train(net, base, data[3:6])
    assert theirs.count > 0
    assert ours.count == theirs.count * (1 if method == "eflat" else 2)
    return errors


def accumulation(method: str) -> None:
    """Check micro-batches within ``no_sync``: equal bits, and the same as one process."""
    data = batches(6)
    one, model = lora_mlp(), lora_mlp()
    net = DistributedDataParallel(model)
    optimizer, single = optimizer_of(net, method), optimizer_of(one, method)

    def gradients(of: Any, at: int, part: Any) -> None:
        for micro in (at, at + 1):
            last = of is one or micro > at
            with nullcontext() if last else net.no_sync():
                loss_of(of, part(data[micro])).div(2).backward()

    for at in (0, 2, 4):
        for of, own, part in ((net, optimizer, own_part), (one, single, lambda batch: batch)):
            own.zero_grad()
            gradients(of, at, part)
            if method != "eflat":
                own.first_step()
                gradients(of, at, part)
            if of is net:
                assert_same_on_all_ranks(named(model))
            own.step()
    assert_same_on_all_ranks(named(model))
    assert max(errors_against(model, optimizer, one, single).values()) < 1e-9


def evaluation_of_the_inner_model() -> None:
    """Evaluate on one rank alone, within a step, while the wrapper stays in training mode."""
    model, data = lora_mlp(), batches(4)
    net = DistributedDataParallel(model)
    optimizer = optimizer_of(net)
    train(net, optimizer, data[:3])
    x = data[3][0]
    with optimizer.clean(), torch.no_grad():
        expected = model(x)
    with torch.no_grad():
        assert not torch.equal(model(x), expected)
    loss_of(net, own_part(data[3])).backward()
    assert net.training
    if dist.get_rank() == 0:
        net.module.eval()
        assert torch.equal(net.module(x), expected)
        net.module.train()
    optimizer.step()
    assert_same_on_all_ranks(named(model))


def layer_unused_on_one_rank(onto: str) -> None:
    """Drop a layer on one rank: its gradient, and its point, come from the other rank."""
    model = lora_mlp(init_lora_weights=False)
    inner = model.base_model.model
    up = inner.up
    net = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = optimizer_of(net, onto=onto)
    data = batches(6)
    train(net, optimizer, data[:3])
    if dist.get_rank() == 1:
        inner.up = up.base_layer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer, data[3:4])
    inner.up = up
    assert_same_on_all_ranks({**named(model), **optimizer.averages})
    train(net, optimizer, data[4:])
    assert_same_on_all_ranks({**named(model), **optimizer.averages})


def bad_gradient_on_one_rank(value: float, **options: Any) -> None:
    """Check that all ranks skip it and that the averages are unchanged."""
    model = lora_mlp()
    net = DistributedDataParallel(model)
    optimizer = optimizer_of(net, **options)
    data = batches(4)
    train(net, optimizer, data[:3])
    before = {name: average.clone() for name, average in optimizer.averages.items()}
    optimizer.zero_grad()
    loss = loss_of(net, own_part(data[3]))
    (loss * value if dist.get_rank() == 1 else loss).backward()
    optimizer.step()
    assert_same_bits(dict(optimizer.averages), before)
    assert int(optimizer.skipped_perturbations) == len(optimizer.pairs)
    assert_same_on_all_ranks({**optimizer.averages, "skipped": optimizer.skipped_perturbations})


def in_trainer(folder: str) -> None:
    """Train by Hugging Face Trainer, which uses DDP."""
    from trainer_case import arguments, make, own

    model = lora_gpt2()
    run = make(model, arguments(Path(folder), max_steps=3))
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    optimizer = own(run)
    assert all(average.any() for average in optimizer.averages.values())
    assert int(optimizer.skipped_perturbations) == 0
    assert_same_on_all_ranks({**named(model), **optimizer.averages})
