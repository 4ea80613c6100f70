"""Which parameters an optimizer perturbs: the factors of a model's pairs that its base trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from .pairs import LoraPair, Slot
from .stacklevel import stacklevel_of_user


def parameters_of(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """The parameters of all groups, in order."""
    return [parameter for group in groups for parameter in group["params"]]


def perturbed_pairs(
    pairs: list[LoraPair], base: Optimizer, factors: Sequence[str]
) -> tuple[list[LoraPair], list[Slot], list[int]]:
    """The pairs that have a target the base optimizer trains, and those targets, each once.

    And the index of the (first) target of each pair: the experts of a layer share theirs.
    """
    trained = {id(p) for p in parameters_of(base.param_groups) if p.requires_grad}
    kept: list[LoraPair] = []
    slots: list[Slot] = []
    left_out: list[str] = []
    target_of: list[int] = []
    taken: dict[int, tuple[str, int]] = {}  # by whom, and the index of the target
    for pair in pairs:
        of_pair = [pair.slot(factor) for factor in factors]
        own = [slot for slot in of_pair if id(getattr(*slot)) in trained]
        new: list[int] = []
        for slot in own:
            group, index = taken.setdefault(id(getattr(*slot)), (pair.group, len(slots)))
            if index == len(slots):
                slots.append(slot)
            if group == pair.group:  # tied: once
                new.append(index)
        if new:
            kept.append(pair)
            target_of.append(new[0])
        elif not own:
            left_out.append(pair.group)
    target = " or ".join(factors)
    if not kept:
        raise ValueError(
            f"base: expected an optimizer over trainable LoRA factors, none of its parameters is "
            f"factor {target} of a pair that requires a gradient"
        )
    if left_out:
        warnings.warn(
            f"factor {target} of these pairs is frozen or not among the base optimizer's "
            f"parameters, they train without a perturbation: {', '.join(dict.fromkeys(left_out))}",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    return kept, slots, target_of
