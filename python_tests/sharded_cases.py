"""What the tests with several processes run on each rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models import CREATE, batches, lora_mlp, loss_of
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

Batch = tuple[Tensor, Tensor]


def own_part(batch: Batch) -> Batch:
    """This rank's rows of a batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = (t.chunk(world)[rank] for t in batch)
    return x, y


def shard_model(
    model: nn.Module,
    dim_A: int = 0,
    layers: bool = True,
    mesh: Any = None,
    **options: Any,
) -> nn.Module:
    """``fully_shard`` of LoRA layers and of the root; A is sharded along ``dim_A``."""

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(dim_A if id(parameter) in A else 0)

    A = {id(p) for name, p in model.named_parameters() if "lora_A." in name}
    options = {"shard_placement_fn": placement, "mesh": mesh, **options}
    if layers:
        for module in [m for m in model.modules() if hasattr(m, "lora_A")]:
            fully_shard(module, **options)
    return fully_shard(model, **options)


def optimizer_of(model: nn.Module, method: str = "eflat", **options: Any) -> Any:
    options = {"lr": 1e-2, "rho": 0.3, **options}
    return CREATE[method](model, torch.optim.AdamW, **options)


def train(model: nn.Module, optimizer: Any, data: list[Batch], part: Callable = own_part) -> None:
    for batch in data:

        def closure(batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, part(batch))
            loss.backward()
            return loss

        optimizer.step(closure)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()
        for name, t in tensors.items()
    }


def relative_errors(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert given.keys() == expected.keys()
    errors = [
        (given[name] - value).norm() / value.norm().clamp_min(1e-300)
        for name, value in expected.items()
    ]
    return float(torch.stack(errors).max())


def fsdp_against_one_process(
    method: str = "eflat", steps: int = 20, dim_A: int = 0, layers: bool = True, **options: Any
) -> dict[str, float]:
    """Errors of weights, averages and norms after some steps."""
    data = batches(steps)
    one = lora_mlp()
    single = optimizer_of(one, method, **options)
    train(one, single, data, lambda batch: batch)
    model = shard_model(lora_mlp(), dim_A, layers)
    optimizer = optimizer_of(model, method, **options)
    train(model, optimizer, data)
    errors = {"weights": relative_errors(whole(dict(model.named_parameters())), dict(one.named_parameters()))}
    if method == "eflat":
        errors["averages"] = relative_errors(whole(optimizer.averages), single.averages)
    errors["norms"] = relative_errors(optimizer.perturbation_norms, single.perturbation_norms)
    assert int(optimizer.skipped_perturbations) == int(single.skipped_perturbations)
    return errors
