"""Collect the operators' arguments for one step: whole factors and gradients, as matrices."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eflat_ext.lora import LoraPair, Slot

from .dtensors import is_dtensor
from .gather import Layout


@dataclass
class Operands:
    """Lists with an entry for each pair of a step.

    Attributes:
        indices: of the pairs.
        A, B, grad_A, grad_B, scaling: as the operators take them.
        having: indices of the pairs that have a gradient on this rank.
        missing: how many of the pairs have none on any rank, None where nothing is sharded.
    """

    indices: list[int] = field(default_factory=list)
    A: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    grad_A: list[Tensor] = field(default_factory=list)
    grad_B: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    having: set[int] = field(default_factory=set)
    missing: Tensor | None = None

    @property
    def lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The four lists of matrices."""
        return self.A, self.B, self.grad_A, self.grad_B


def collect(
    pairs: Sequence[LoraPair],
    parameters: Mapping[Slot, Any],
    gradients: Mapping[Any, Tensor] | None,
) -> Operands:
    """Return the operands of the pairs that have a gradient and a scaling.

    Of sharded factors, of all pairs with a scaling: every rank has to name the same, whatever
    gradients it has.

    Args:
        parameters: of all pairs, by where they are held.
        gradients: by parameter; None for ``parameter.grad``.
    """
    found = Operands()
    candidates = [(i, pair) for i, pair in enumerate(pairs) if pair.scaling != 0]
    slots = list(dict.fromkeys(pair.slot(f) for f in "AB" for _, pair in candidates))
    values: Sequence[Any] = [parameters[slot] for slot in slots]
    given: Sequence[Tensor | None] = [
        p.grad if gradients is None else gradients.get(p) for p in values
    ]
    has = {slot for slot, gradient in zip(slots, given, strict=True) if gradient is not None}
    found.having = {i for i, p in candidates if p.slot("A") in has or p.slot("B") in has}
    rows = [(i, pair) for i, pair in candidates if i in found.having]
    if any(map(is_dtensor, values)):
        rows = candidates
        layout = Layout({f"factor {f} of {p.name}": p.parameter(f) for p in pairs for f in "AB"})
        values, given, anywhere = layout.gather(values, given)
        at = {slot: i for i, slot in enumerate(slots)}
        both = torch.tensor([[at[pair.slot(f)] for f in "AB"] for _, pair in rows])
        found.missing = (~anywhere[both.to(anywhere.device)].any(1)).sum()
    of_slot = dict(zip(slots, zip(values, given, strict=True), strict=True))
    for index, pair in rows:
        found.indices.append(index)
        found.scaling.append(pair.scaling)
        for factor, own, grads in (("A", found.A, found.grad_A), ("B", found.B, found.grad_B)):
            value, gradient = of_slot[pair.slot(factor)]
            # Of another type by the parameter's grad_dtype.
            gradient = zeros_like(value) if gradient is None else gradient.to(value.dtype)
            own.append(pair.part(factor, value).flatten(1))
            grads.append(pair.part(factor, gradient).flatten(1))
    return found


def zeros_like(tensor: Tensor) -> Tensor:
    """Return expanded zeros of a tensor's shape, type and device, without storage of their own."""
    return _zero(tensor.dtype, tensor.device).expand(tensor.shape)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)
