"""Scale averages onto A down until ``||s B average|| <= rho``.

They were made with an earlier B: while B is small and grows, the product would explode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eflat_ext.lora import LoraPair, Slot

from .dtensors import gathered, is_dtensor, is_partitioned, local
from .gather import Layout
from .layer_forward import PerturbedFactor
from .operands import joined_norms, total_norm


class Bound:
    """Keep the E of factors A at their averages, scaled down to rho by B as it is.

    E is recomputed when it is needed and B, the scaling or rho has changed since, which writes
    through ``B.data`` do not show. A compiled pass cannot tell: there :meth:`update` after each
    step does it.

    Args:
        pairs: with the perturbed factor A of each.
        parameters: by where they are held, as the perturbation last saw them.
        norm_scope, radius: of the perturbation.

    Attributes:
        radius: rho, for the passes to come.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[LoraPair, PerturbedFactor]],
        parameters: Mapping[Slot, Any],
        norm_scope: str,
        radius: float,
    ) -> None:
        self._pairs, self._parameters = list(pairs), parameters
        self._scope, self.radius = norm_scope, radius
        self._seen: dict[PerturbedFactor, object] = {}
        for _, factor in pairs:
            if factor.average is factor.E:
                with torch.inference_mode(False):
                    factor.average = factor.E.clone()
        self._pairs_of: dict[PerturbedFactor, list[LoraPair]] = {}
        for pair, factor in pairs:
            self._pairs_of.setdefault(factor, []).append(pair)
            factor.refresh = self.refresh

    def refresh(self, factor: PerturbedFactor) -> None:
        """Recompute E if what it depends on has changed."""
        # Where factors are sharded this gathers B; all ranks edit, scale and load alike.
        if self._seen.get(factor) != self._state(factor):
            self.update()

    def average_changed(self) -> None:
        """Invalidate E; the next use recomputes it."""
        self._seen.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Recompute every E; where factors are sharded, in one collective operation."""
        # A layer scaled by zero has no full-space norm, and a deleted adapter no factors.
        rows = [(pair, factor) for pair, factor in self._pairs if pair.scaling != 0]
        if not rows:
            return
        for _, factor in rows:  # the model may have been moved since
            parameter = factor.parameter
            if (parameter.device, parameter.dtype) != factor.fitted_to:
                factor.fit(torch.promote_types(parameter.dtype, torch.float32))
        B: list[Tensor] = [self._parameters[pair.slots["B"]] for pair, _ in rows]
        if any(map(is_dtensor, B)):
            names = [f"factor B of {pair.name}" for pair, _ in rows]
            B, _, _ = Layout(dict(zip(names, B, strict=True))).gather(B, [None] * len(B))
        B = gathered(B)
        averages = [pair.part("A", factor.average) for pair, factor in rows]
        B = [pair.part("B", b).flatten(1) for (pair, _), b in zip(rows, B, strict=True)]
        scales = self._scales([a.flatten(1) for a in averages], B, [p.scaling for p, _ in rows])
        E = [pair.part("A", factor.E) for pair, factor in rows]
        torch._foreach_copy_(E, torch._foreach_mul(averages, scales))
        self._seen = {factor: self._state(factor) for _, factor in rows}

    def _scales(
        self, averages: Sequence[Tensor], B: Sequence[Tensor], scaling: Sequence[float]
    ) -> list[Tensor]:
        """Return what each average is multiplied by; in one call for each device."""
        devices: dict[torch.device, list[int]] = {}
        for i, average in enumerate(averages):
            devices.setdefault(average.device, []).append(i)

        def factors(chosen: list[int], rho: float, norm_scope: str) -> Tensor:
            lists = ([values[i] for i in chosen] for values in (averages, B, scaling))
            ema, own_B, own_scaling = lists
            return torch.ops.eflat.foreach_bound(
                ema=ema, B=own_B, scaling=own_scaling, rho=rho, norm_scope=norm_scope
            )

        if len(devices) == 1 or self._scope == "layer":
            parts = [factors(chosen, self.radius, self._scope) for chosen in devices.values()]
        else:
            # For a rho far below every norm that matters, the factor is rho over the norm.
            small = max(1e-15 * self.radius, 1e-30)
            own = [(chosen, small / factors(chosen, small, "layer")) for chosen in devices.values()]
            norms = joined_norms(own)
            total = torch.where(norms.isfinite().all(), total_norm(norms), torch.inf)
            scale = (self.radius / total).clamp_max(1)
            parts = [scale.to(norms.device).expand_as(norms) for _, norms in own]
        of_row = {
            i: scale
            for chosen, part in zip(devices.values(), parts, strict=True)
            for i, scale in zip(chosen, part.unbind(), strict=True)
        }
        return [of_row[i] for i in range(len(averages))]

    def _state(self, factor: PerturbedFactor) -> object:
        B = [self._parameters[pair.slots["B"]] for pair in self._pairs_of[factor]]
        scalings = [pair.scaling for pair in self._pairs_of[factor]]
        return self.radius, scalings, [_state(t) for b in B for t in (b, local(b))]


def _state(tensor: Tensor) -> tuple[int, int]:
    # A DTensor has no memory of its own, and a partitioned one another at each pass; of tensors of
    # inference mode nobody counts versions.
    if is_partitioned(tensor):
        return id(tensor), 0
    return (
        id(tensor) if is_dtensor(tensor) else tensor.data_ptr(),
        0 if tensor.is_inference() else tensor._version,
    )
