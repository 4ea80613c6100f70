"""What perturbed weights have added to them: tensors as they are, or bounded by their radius."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtensors import laid_out_as, local, same_layout
from .pairs import LoraPair
from .sharded import Sharding


class Addition:
    """Adds one tensor to each target, but to those that were frozen meanwhile."""

    def __init__(self, deltas: list[Tensor]) -> None:
        self.deltas = deltas

    def __call__(self, targets: list[Tensor]) -> None:
        deltas = self.on_devices_of(targets)
        rows = [(local(t), local(d)) for t, d in zip(targets, deltas, strict=True) if _trains(t)]
        if rows:
            torch._foreach_add_(*map(list, zip(*rows, strict=True)))

    def idle(self) -> bool:
        """Whether it adds zeros."""
        return not any(bool(local(delta).any()) for delta in self.deltas)

    def on_devices_of(self, targets: list[Tensor]) -> list[Tensor]:
        """The tensors, moved where their targets have moved, and sharded as these are."""
        for index, (delta, target) in enumerate(zip(self.deltas, targets, strict=True)):
            if delta.device != target.device:
                self.deltas[index] = delta.to(target.device)
            if not same_layout(delta, target):
                self.deltas[index] = laid_out_as(self.deltas[index], target)
        return self.deltas


class PartialAddition(Addition):
    """Adds tensors to the targets of some indices, to none until both are assigned."""

    def __init__(self) -> None:
        super().__init__([])
        self.indices: list[int] = []

    def __call__(self, targets: list[Tensor]) -> None:
        super().__call__([targets[index] for index in self.indices])


class BoundedAverages(Addition):
    """Adds averages, those onto A scaled down until ``||s B average|| <= rho``.

    They were made with an earlier B: while B is small and grows, the product would explode.

    Args:
        target_of: for each pair, the indices of its targets by factor.
    """

    def __init__(
        self,
        averages: list[Tensor],
        pairs: list[LoraPair],
        target_of: list[dict[str, int]],
        norm_scope: str,
    ) -> None:
        super().__init__(averages)
        self._onto_B = sorted({targets["B"] for targets in target_of if "B" in targets})
        # A tensor on the host: a compiled forward pass would be compiled anew for each number.
        self.rho = torch.zeros((), dtype=torch.float64)
        self._pairs, self._target_of = pairs, [targets["A"] for targets in target_of]
        self._scope = norm_scope

    def __call__(self, targets: list[Tensor]) -> None:
        averages = self.on_devices_of(targets)
        self._add_onto_A(targets, averages)  # first: its bound needs B as it is
        onto_B = [i for i in self._onto_B if _trains(targets[i])]
        if onto_B:
            onto, added = ([local(x[i]) for i in onto_B] for x in (targets, averages))
            torch._foreach_add_(onto, added)

    def _add_onto_A(self, targets: list[Tensor], averages: list[Tensor]) -> None:
        # A layer scaled by zero has no full-space norm, and adds nothing to the model either; a
        # deleted adapter has no factors any more.
        rows = [
            (pair, i)
            for pair, i in zip(self._pairs, self._target_of, strict=True)
            if pair.scaling != 0 and _trains(targets[i])
        ]
        if not rows:
            return
        pairs, target_of = map(list, zip(*rows, strict=True))
        sharding = Sharding.of(pairs)
        if sharding is not None:
            self._add_shards(sharding, targets, averages, pairs, target_of)
            return
        chosen = [pair.part("A", averages[i]) for pair, i in rows]
        factors = torch.ops.eflat_ext.bound(
            [part.flatten(1) for part in chosen],
            [pair.B for pair, _ in rows],
            [pair.scaling for pair, _ in rows],
            self.rho,
            self._scope,
        )
        scaled = torch._foreach_mul(chosen, list(factors.unbind()))
        torch._foreach_add_([pair.part("A", targets[i]) for pair, i in rows], scaled)

    def _add_shards(
        self,
        sharding: Sharding,
        targets: list[Tensor],
        averages: list[Tensor],
        pairs: list[LoraPair],
        target_of: list[int],
    ) -> None:
        chosen = [averages[i] for i in target_of]
        factors = sharding.bound(pairs, chosen, float(self.rho), self._scope)
        for i, factor in sharding.spread(pairs, target_of, "A", factors.unbind()).items():
            local(targets[i]).add_(local(averages[i]) * factor)


def _trains(target: Tensor) -> bool:
    """Whether it has not been frozen since: what is added to it would stay the same for ever."""
    return target.requires_grad


@torch.library.custom_op("eflat_ext::bound", mutates_args=())
def _bound(
    averages: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    rho: Tensor,
    norm_scope: str,
) -> Tensor:
    return torch.ops.eflat.foreach_bound(averages, B, scaling, rho.item(), norm_scope)


@_bound.register_fake
def _(
    averages: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    rho: Tensor,
    norm_scope: str,
) -> Tensor:
    return torch.ops.eflat.foreach_bound(averages, B, scaling, 1.0, norm_scope)
