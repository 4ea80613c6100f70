"""Gather factors and gradients that are sharded among ranks, as FSDP2's ``fully_shard`` does.

LoRA's factors are small, so every rank gets them whole and computes the same perturbation from
them, bit for bit, as one process would. All tensors of a step travel in one collective operation,
in which every rank takes part whatever its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensors import is_dtensor, local, same_layout

SUPPORTED = (
    "Shard(dim) on one dimension of one mesh, Replicate() on its others, for all factors alike "
    "(torch.distributed.fsdp.fully_shard, applied to the root, too)"
)

# A torch without torch.distributed has neither name.
_all_gather: Any = getattr(torch.distributed, "all_gather_single", None) or getattr(
    torch.distributed, "all_gather_into_tensor", None
)


class Layout:
    """How the factors of a model are sharded.

    Args:
        parameters: factors by a name for messages.

    Raises:
        NotImplementedError: a layout other than ``SUPPORTED``.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.mesh = next((p.device_mesh for p in parameters.values() if is_dtensor(p)), None)
        self.axis: int | None = None  # of the mesh, along which factors are sharded
        for name, parameter in parameters.items():
            if self.mesh is not None:
                self._check(name, parameter)

    def _check(self, name: str, parameter: Any) -> None:
        if not is_dtensor(parameter):
            self._refuse(f"{name} is no DTensor while others are")
        if parameter.device_mesh != self.mesh:
            self._refuse(f"{name} is on {parameter.device_mesh}, others are on {self.mesh}")
        for axis, placement in enumerate(parameter.placements):
            kind = type(placement).__name__
            if kind != "Replicate":
                if kind != "Shard" or self.axis not in (None, axis):
                    self._refuse(f"{name} has the placements {tuple(parameter.placements)}")
                self.axis = axis

    @staticmethod
    def _refuse(what: str) -> None:
        raise NotImplementedError(f"sharded model: {what}; supported are {SUPPORTED}")

    def gather(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return parameters and gradients whole, zeros where there is no gradient.

        And which of the parameters have a gradient on any rank: bool, on their device.

        Raises:
            RuntimeError: a gradient is laid out in another way than its parameter.
        """
        shards = [self._padded(p, local(p)) for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and not same_layout(gradient, parameter):
                raise RuntimeError(
                    "sharded model: gradients must be laid out as their parameters, "
                    f"{parameter.placements}, got {getattr(gradient, 'placements', type(gradient))}"  # type: ignore[attr-defined]
                )
            own = local(parameter)
            held = torch.zeros_like(own) if gradient is None else local(gradient)
            shards.append(self._padded(parameter, held.to(own.dtype)))
        there = [gradient is not None for gradient in gradients]
        shards.append(torch.tensor(there, dtype=torch.uint8, device=shards[0].device))
        *received, found = self._exchange(shards)
        count = len(parameters)
        whole = [self._joined(parameters[i % count], ranks) for i, ranks in enumerate(received)]
        return whole[:count], whole[count:], found.bool().any(0)

    def _dim(self, parameter: Any) -> int | None:
        return None if self.axis is None else getattr(parameter.placements[self.axis], "dim", None)

    def _padded(self, parameter: Tensor, shard: Tensor) -> Tensor:
        """Return a shard with as many rows along its dimension as the first rank has."""
        dim = self._dim(parameter)
        if dim is None:
            return shard
        ranks = self.mesh.size(self.axis)  # type: ignore[union-attr]
        shape = list(shard.shape)
        shape[dim] = -(-parameter.shape[dim] // ranks) - shard.shape[dim]
        return torch.cat([shard, shard.new_zeros(shape)], dim) if shape[dim] else shard

    def _joined(self, parameter: Tensor, ranks: Tensor) -> Tensor:
        dim = self._dim(parameter)
        if dim is None:
            return ranks[0]
        return torch.cat(list(ranks), dim).narrow(dim, 0, parameter.shape[dim]).contiguous()

    def _exchange(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send tensors of the same shapes on every rank to all; return each as (ranks, ...)."""
        if self.axis is None:
            return [tensor[None] for tensor in tensors]
        group = self.mesh.get_group(self.axis)  # type: ignore[union-attr]
        world = torch.distributed.get_world_size(group)
        # As bytes, the widest types first, so that each type finds itself aligned.
        order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
        pieces = [tensors[i].contiguous().reshape(-1).view(torch.uint8) for i in order]
        pieces.append(pieces[0].new_zeros(-sum(map(len, pieces)) % 8))
        sent = torch.cat(pieces)
        received = sent.new_empty(world * len(sent))
        _all_gather(received, sent, group=group)
        columns = received.view(world, -1).split([len(piece) for piece in pieces], 1)[:-1]
        found: dict[int, Tensor] = {}
        for i, piece in zip(order, columns, strict=True):
            found[i] = piece.contiguous().view(tensors[i].dtype).view(world, *tensors[i].shape)
        return [found[i] for i in range(len(tensors))]
