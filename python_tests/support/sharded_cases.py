"""Models sharded or replicated among ranks, and comparisons between ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from models import CREATE, batches, lora_mlp, loss_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

Batch = tuple[Tensor, Tensor]


def own_part(batch: Batch) -> Batch:
    """Return this rank's rows of a batch."""
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
    """Apply ``fully_shard`` to LoRA layers and to the root; A is sharded along ``dim_A``."""

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
    """Return copies of the tensors, gathered if they are sharded."""
    return {
        name: (t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach()).clone()
        for name, t in tensors.items()
    }


def relative_errors(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    given = {name.removeprefix("module."): value for name, value in given.items()}  # of DDP
    assert given.keys() == expected.keys()
    errors = [
        (given[name] - value).detach().norm() / value.norm().clamp_min(1e-300)
        for name, value in expected.items()
    ]
    return float(torch.stack(errors).max())


def assert_same_on_all_ranks(tensors: dict[str, Tensor]) -> None:
    """Assert the same bits on all ranks; sharded tensors are gathered first."""
    digest = hashlib.sha256()
    for name, tensor in sorted(whole(tensors).items()):
        digest.update(
            name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    assert len(set(digests)) == 1, digests


def named(model: nn.Module) -> dict[str, Tensor]:
    return whole(dict(model.named_parameters()))


def one_process(method: str, steps: int, config: dict[str, Any], **options: Any) -> Any:
    """Return a model trained on whole batches, and its optimizer."""
    model = lora_mlp(**config)
    optimizer = optimizer_of(model, method, **options)
    train(model, optimizer, batches(steps), lambda batch: batch)
    return model, optimizer


def errors_against(
    model: nn.Module, optimizer: Any, one: nn.Module, single: Any
) -> dict[str, float]:
    """Return relative errors of weights, averages and norms; assert equal counts."""
    errors = {"weights": relative_errors(named(model), named(one))}
    if hasattr(single, "averages"):
        errors["averages"] = relative_errors(whole(optimizer.averages), single.averages)
    errors["norms"] = relative_errors(optimizer.perturbation_norms, single.perturbation_norms)
    for own in (optimizer, single):
        assert int(own.skipped_perturbations) == 0
    return errors
