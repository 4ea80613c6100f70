"""Collect the operators' arguments for one step: whole factors and gradients, as matrices."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from eflat_ext.lora import LoraPair, Slot

from .dtensors import gathered, is_dtensor
from .gather import Layout
from .layer_forward import PerturbedFactor


class Target(NamedTuple):
    """A perturbed factor of a pair; the experts of a layer share one.

    Attributes:
        at: the pair's index.
        pair: the pair.
        carrier: which of its factors, "A" or "B".
        factor: what is added to that factor.
    """

    at: int
    pair: LoraPair
    carrier: str
    factor: PerturbedFactor


@dataclass
class Operands:
    """The operators' arguments for one step, with an entry for each pair.

    Attributes:
        indices: of the pairs.
        A, B, grad_A, grad_B, scaling: as the operators take them.
        parameters: those of all A, then those of all B.
        having: indices of the pairs that have a gradient on this rank.
        missing: how many of the pairs have none on any rank, None where nothing is sharded.
        targets: the perturbed factors of these pairs, as the operators list them: all A, then B.
    """

    indices: list[int] = field(default_factory=list)
    A: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    grad_A: list[Tensor] = field(default_factory=list)
    grad_B: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    having: set[int] = field(default_factory=set)
    missing: Tensor | None = None
    targets: list[Target] = field(default_factory=list)

    def by_device(self) -> list[tuple[list[int], Operands]]:
        """Return, for each device, the places of its pairs, and their operands."""
        places: dict[torch.device, list[int]] = {}
        for place, factor in enumerate(self.A):
            places.setdefault(factor.device, []).append(place)
        if len(places) < 2:
            return [(list(range(len(self.A))), self)]
        return [(chosen, self._of(chosen)) for chosen in places.values()]

    def _of(self, places: list[int]) -> Operands:
        indices = [self.indices[place] for place in places]
        chosen = set(indices)
        lists = (self.A, self.B, self.grad_A, self.grad_B)
        A, B, grad_A, grad_B = ([tensors[place] for place in places] for tensors in lists)
        return Operands(
            indices,
            A,
            B,
            grad_A,
            grad_B,
            [self.scaling[place] for place in places],
            [self.parameters[half + place] for half in (0, len(self.A)) for place in places],
            self.having,
            None,
            [target for target in self.targets if target.at in chosen],
        )


def collect(
    pairs: Sequence[LoraPair],
    targets: Sequence[Target],
    parameters: Mapping[Slot, Any],
    gradients: Mapping[Any, Tensor] | None,
) -> Operands:
    """Return the operands of the pairs that have a gradient and a scaling.

    Of sharded factors, of all pairs with a scaling: every rank has to name the same, whatever
    gradients it has.

    Args:
        pairs: all perturbed pairs.
        targets: all perturbed factors.
        parameters: of all pairs, by where they are held.
        gradients: by parameter; None for ``parameter.grad``.
    """
    found = Operands()
    candidates = [(i, pair, scaling) for i, pair in enumerate(pairs) if (scaling := pair.scaling)]
    slots = list(dict.fromkeys(pair.slots[f] for f in "AB" for _, pair, _ in candidates))
    values: list[Any] = [parameters[slot] for slot in slots]
    given: Sequence[Tensor | None] = [
        p.grad if gradients is None else gradients.get(p) for p in values
    ]
    has = {slot for slot, gradient in zip(slots, given, strict=True) if gradient is not None}
    found.having = {i for i, pair, _ in candidates if not has.isdisjoint(pair.slots.values())}
    rows = [row for row in candidates if row[0] in found.having]
    if any(type(value) is not Parameter and is_dtensor(value) for value in values):
        rows = candidates
        layout = Layout({f"factor {f} of {p.name}": p.parameter(f) for p in pairs for f in "AB"})
        values, given, anywhere = layout.gather(values, given)
        at = {slot: i for i, slot in enumerate(slots)}
        both = torch.tensor([[at[slot] for slot in pair.slots.values()] for _, pair, _ in rows])
        found.missing = (~anywhere[both.to(anywhere.device)].any(1)).sum()
    values = gathered(values)
    of_slot = dict(zip(slots, zip(values, given, strict=True), strict=True))
    found.indices = [i for i, _, _ in rows]
    found.scaling = [scaling for _, _, scaling in rows]
    for factor, own, grads in (("A", found.A, found.grad_A), ("B", found.B, found.grad_B)):
        for _, pair, _ in rows:
            slot = pair.slots[factor]
            value, gradient = of_slot[slot]
            # Of another type by the parameter's grad_dtype.
            gradient = zeros_like(value) if gradient is None else gradient.to(value.dtype)
            own.append(pair.part(factor, value).flatten(1))
            grads.append(pair.part(factor, gradient).flatten(1))
            found.parameters.append(parameters[slot])
    chosen = set(found.indices)
    found.targets = [target for target in targets if target.at in chosen]
    return found


def usable(norms: Tensor) -> Tensor:
    """Return which norms are neither zero nor infinite nor NaN."""
    return norms.isfinite() & (norms > 0)


def total_norm(norms: Tensor) -> Tensor:
    """Return the root of the sum of squares of the norms that are usable."""
    good = torch.where(usable(norms), norms, 0)
    largest = good.amax().clamp_min(torch.finfo(norms.dtype).tiny)  # no square overflows
    return largest * (good / largest).square().sum().sqrt()


def joined_norms(parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Return norms from several devices as one tensor on the first; with the places of each."""
    device = parts[0][1].device
    dtype = functools.reduce(torch.promote_types, (norms.dtype for _, norms in parts))
    places = [place for chosen, _ in parts for place in chosen]
    joined = torch.cat([norms.to(device, dtype) for _, norms in parts])
    order = sorted(range(len(places)), key=places.__getitem__)
    return joined[torch.tensor(order).to(device, non_blocking=True)]


def zeros_like(tensor: Tensor) -> Tensor:
    """Return expanded zeros of a tensor's shape, type and device, without storage of their own."""
    return _zero(tensor.dtype, tensor.device).expand(tensor.shape)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)
