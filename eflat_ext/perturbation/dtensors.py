"""What the optimizers need of torch's sharded tensors and of FSDP2: local shards, equal layouts.

Nothing here imports ``torch.distributed.tensor``, which takes long: whoever has a DTensor has
imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its own memory, without a gradient."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def laid_out_as(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that is whole on every rank, or a DTensor, in the layout of ``like``.

    Only a DTensor of another layout needs communication.
    """
    if not is_dtensor(like):
        return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        if same_layout(tensor, like):
            return tensor
        return tensor.redistribute(like.device_mesh, like.placements)
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def same_layout(tensor: Tensor, like: Any) -> bool:
    """Whether two tensors are both plain, or DTensors of the same mesh and placements."""
    if not (is_dtensor(tensor) and is_dtensor(like)):
        return is_dtensor(tensor) == is_dtensor(like)
    given: Any = tensor
    return given.device_mesh == like.device_mesh and given.placements == like.placements


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules to which ``fully_shard`` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", None)
    return [] if cls is None else [module for module in model.modules() if isinstance(module, cls)]


def reshard(modules: Iterable[Any]) -> None:
    """Let modules hold their shards, and forget what they gathered from values that change now.

    FSDP2 keeps the parameters of its root module gathered from a forward pass to its backward
    pass, and after an evaluation even to the next forward pass.
    """
    for module in modules:
        module.reshard()


def refuse_flat_parameters(model: nn.Module) -> None:
    """NotImplementedError for the older FSDP, which flattens many parameters into one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FullyShardedDataParallel", None)
    names = [] if cls is None else [n for n, m in model.named_modules() if isinstance(m, cls)]
    if names:
        raise NotImplementedError(
            "model: FullyShardedDataParallel flattens parameters, so that no factor of a LoRA pair "
            f"is left to perturb (in {names[0] or 'the model itself'}); expected a model sharded "
            "by torch.distributed.fsdp.fully_shard"
        )
