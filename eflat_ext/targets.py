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
    pairs: list[LoraPair], base: Optimizer, factors: Sequence[str], together: bool
) -> tuple[list[LoraPair], list[Slot], list[dict[str, int]]]:
    """The pairs that have a target the base optimizer trains, and those targets, each once.

    And, for each pair, the index of its target by factor: the experts of a layer share theirs.

    Args:
        together: leave out pairs of which not all factors are targets of their own.
    """
    trained = {id(p) for p in parameters_of(base.param_groups) if p.requires_grad}
    kept: list[LoraPair] = []
    slots: list[Slot] = []
    left_out: list[str] = []
    target_of: list[dict[str, int]] = []
    taken: dict[int, tuple[str, int]] = {}  # by whom, and the index of the target
    for pair in pairs:
        of_pair = {factor: pair.slot(factor) for factor in factors}
        own = {f: slot for f, slot in of_pair.items() if id(getattr(*slot)) in trained}
        free = {
            factor: slot
            for factor, slot in own.items()
            if taken.get(id(getattr(*slot)), (pair.group, 0))[0] == pair.group  # tied: once
        }
        if len(free) < (len(factors) if together else 1):
            if together or not own:
                left_out.append(pair.group)
            continue
        kept.append(pair)
        new: dict[str, int] = {}
        for factor, slot in free.items():
            new[factor] = taken.setdefault(id(getattr(*slot)), (pair.group, len(slots)))[1]
            if new[factor] == len(slots):
                slots.append(slot)
        target_of.append(new)
    target = " or ".join(factors)
    if not kept:
        none = f"none of its parameters is factor {target} of a pair that requires a gradient"
        if together:
            none = 'it has both factors of no pair, as onto="both" needs'
        raise ValueError(f"base: expected an optimizer over trainable LoRA factors, {none}")
    if left_out:
        tied = "tied to another's, " if together else ""
        warnings.warn(
            f"factor {target} of these pairs is frozen, {tied}or not among the base optimizer's "
            f"parameters, they train without a perturbation: {', '.join(dict.fromkeys(left_out))}",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    return kept, slots, target_of
