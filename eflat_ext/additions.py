"""What perturbed weights have added to them: tensors as they are, or bounded by their radius."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtensors import laid_out_as, local, same_layout
from .pairs import LoraPair
from .sharded import Sharding


class Addition:
    """Adds one tensor to each target.

    Args:
        pairs: what is frozen while its adapter is in use gets nothing: it would be the same for
            ever.
        target_of: for each pair, the indices of its targets by factor.
    """

    def __init__(
        self,
        deltas: list[Tensor],
        pairs: Sequence[LoraPair] = (),
        target_of: Sequence[dict[str, int]] = (),
    ) -> None:
        self.deltas = deltas
        owners = zip(pairs, target_of, strict=True)
        self._owners = {index: pair for pair, own in owners for index in own.values()}

    def __call__(self, targets: list[Tensor]) -> None:
        deltas = self.on_devices_of(targets)
        self._add([i for i in range(len(targets)) if not self._frozen(i, targets)], targets, deltas)

    def _add(self, indices: list[int], targets: list[Tensor], deltas: list[Tensor]) -> None:
        if indices:
            onto, added = ([local(tensors[i]) for i in indices] for tensors in (targets, deltas))
            torch._foreach_add_(onto, added)

    def _frozen(self, index: int, targets: list[Tensor]) -> bool:
        # PEFT freezes an adapter that is switched off for a while; its average is due again.
        if targets[index].requires_grad or index not in self._owners:
            return False
        return self._owners[index].active

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
        pairs, target_of: as those of an :class:`Addition`.
    """

    def __init__(
        self,
        averages: list[Tensor],
        pairs: list[LoraPair],
        target_of: list[dict[str, int]],
        norm_scope: str,
    ) -> None:
        super().__init__(averages, pairs, target_of)
        self._onto_B = sorted({targets["B"] for targets in target_of if "B" in targets})
        # A tensor on the host: a compiled forward pass would be compiled anew for each number.
        self.rho = torch.zeros((), dtype=torch.float64)
        self._pairs, self._target_of = pairs, [targets["A"] for targets in target_of]
        self._scope = norm_scope

    def __call__(self, targets: list[Tensor]) -> None:
        averages = self.on_devices_of(targets)
        self._add_onto_A(targets, averages)  # first: its bound needs B as it is
        onto_B = [i for i in self._onto_B if not self._frozen(i, targets)]
        self._add(onto_B, targets, averages)

    def _add_onto_A(self, targets: list[Tensor], averages: list[Tensor]) -> None:
        # A layer scaled by zero has no full-space norm, and adds nothing to the model either; a
        # deleted adapter has no factors any more.
        rows = [
            (pair, i)
            for pair, i in zip(self._pairs, self._target_of, strict=True)
            if pair.scaling != 0 and not self._frozen(i, targets)
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
