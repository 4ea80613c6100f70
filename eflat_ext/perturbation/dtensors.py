"""Read sharded parameters: torch's DTensors, FSDP2's modules, DeepSpeed's ZeRO 3.

``torch.distributed.tensor`` and DeepSpeed take long to import, so nothing here does: a program that
has a sharded parameter has imported them already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter


def is_dtensor(tensor: Tensor) -> bool:
    """Return True for a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor on this rank, without a gradient; the tensor if it is plain."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def laid_out_as(tensor: Tensor, like: Any) -> Tensor:
    """Return a tensor in the layout of ``like``; it is a DTensor, or whole on every rank.

    Communicates only for a DTensor of another layout.
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
    """Return True for two plain tensors, or two DTensors of the same mesh and placements."""
    if not (is_dtensor(tensor) and is_dtensor(like)):
        return is_dtensor(tensor) == is_dtensor(like)
    given: Any = tensor
    return given.device_mesh == like.device_mesh and given.placements == like.placements


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules to which ``fully_shard`` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", None)
    return [] if cls is None else [module for module in model.modules() if isinstance(module, cls)]


def reshard(modules: Iterable[Any]) -> None:
    """Make modules hold their shards and drop what they gathered, which changes now.

    FSDP2 keeps the parameters of its root module gathered from a forward pass to its backward
    pass, and after an evaluation even to the next forward pass.
    """
    for module in modules:
        module.reshard()


def is_partitioned(parameter: Tensor) -> bool:
    """Return True for a parameter that ZeRO 3 has partitioned: empty but while its module runs."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Sequence[Any]) -> list[Any]:
    """Return copies of the parameters that ZeRO 3 has partitioned, whole; the others as they are.

    Communicates if one of them is not there, so all ranks have to call this.

    Raises:
        RuntimeError: one of them is on its way to a forward pass, which the engine waits for.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return list(parameters)
    absent = [p for p in partitioned if p.ds_status.name != "AVAILABLE"]
    if any(p.ds_status.name == "INFLIGHT" for p in absent):
        raise RuntimeError(
            "factors must be read before or after a forward pass at ZeRO 3, got one that is being "
            "gathered: attach the perturbation to the engine, and assign its rho when scalings of "
            "layers have changed"
        )
    with torch.no_grad(), sys.modules["deepspeed"].zero.GatheredParameters(absent):
        return [p.detach().clone() if is_partitioned(p) else p for p in parameters]


def is_gathered_by(module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a parameter becomes whole when the module that owns it runs, not before."""
    if type(parameter) is Parameter:
        return is_partitioned(parameter)
    return is_dtensor(parameter) and module in fsdp_modules(module)[:1]


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raise NotImplementedError for the older FSDP, which flattens many parameters into one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FullyShardedDataParallel", None)
    names = [] if cls is None else [n for n, m in model.named_modules() if isinstance(m, cls)]
    if names:
        raise NotImplementedError(
            "model must be sharded by torch.distributed.fsdp.fully_shard, got "
            f"FullyShardedDataParallel in {names[0] or 'the model itself'}, which flattens "
            "parameters, so that no factor of a LoRA pair is left to perturb"
        )
