"""Choose the parameters that are perturbed: factors of a model's pairs that an optimizer trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from eflat_ext.lora import LoraPair, Slot, held
from eflat_ext.stacklevel import stacklevel_of_user


def parameters_of(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """Return the parameters of all groups, in order."""
    return [parameter for group in groups for parameter in group["params"]]


def perturbed_pairs(
    pairs: list[LoraPair], trained: Iterable[Any] | None, factors: Sequence[str], together: bool
) -> tuple[list[LoraPair], list[Slot], list[dict[str, int]]]:
    """Return the pairs that have a target, and the targets, each once.

    And, for each pair, the index of its target by factor: the experts of a layer share theirs.

    Args:
        pairs: all pairs of a model.
        trained: the parameters of an optimizer; None for those of ``factors`` in all pairs.
        factors: which may be targets, "A", "B" or both.
        together: leave out pairs of which not all factors are targets of their own.

    Raises:
        ValueError: there is no target.
    """
    everything = (held(pair.slot(f)) for pair in pairs for f in factors)
    named = "the optimizer's parameters" if trained is not None else "what the model trains"
    own_ids = {id(p) for p in (everything if trained is None else trained) if p.requires_grad}
    kept: list[LoraPair] = []
    slots: list[Slot] = []
    left_out: list[str] = []
    target_of: list[dict[str, int]] = []
    taken: dict[int, tuple[str, int]] = {}  # by whom, and the index of the target
    for pair in pairs:
        of_pair = {factor: pair.slot(factor) for factor in factors}
        own = {f: slot for f, slot in of_pair.items() if id(held(slot)) in own_ids}
        free = {
            factor: slot
            for factor, slot in own.items()
            if taken.get(id(held(slot)), (pair.group, 0))[0] == pair.group  # tied: once
        }
        if len(free) < (len(factors) if together else 1):
            if together or not own:
                left_out.append(pair.group)
            continue
        kept.append(pair)
        new: dict[str, int] = {}
        for factor, slot in free.items():
            new[factor] = taken.setdefault(id(held(slot)), (pair.group, len(slots)))[1]
            if new[factor] == len(slots):
                slots.append(slot)
        target_of.append(new)
    target = " or ".join(factors)
    if not kept:
        none = f"none of {named} is factor {target} of a pair that requires a gradient"
        if together:
            none = f'{named} hold both factors of no pair, as onto="both" needs'
        raise ValueError(
            f"base: expected an optimizer over trainable LoRA factors, {none}"
            if trained is not None
            else f"model: expected trainable LoRA factors, {none}"
        )
    if left_out:
        tied = "tied to another's, " if together else ""
        warnings.warn(
            f"factor {target} of these pairs is frozen, {tied}or not among {named}, "
            f"they train without a perturbation: {', '.join(dict.fromkeys(left_out))}",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    return kept, slots, target_of
