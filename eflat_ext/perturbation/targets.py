"""Choose the parameters that are perturbed: factors of a model's pairs that an optimizer trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from eflat_ext.lora import LoraPair, Slot, held
from eflat_ext.stacklevel import stacklevel_of_user

from .dtensors import is_dtensor


def parameters_of(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """Return the parameters of all groups, in order."""
    return [parameter for group in groups for parameter in group["params"]]


def choose_targets(
    pairs: list[LoraPair], trained: Iterable[Any] | None, carriers: Sequence[str], whole_pairs: bool
) -> list[tuple[LoraPair, dict[str, Slot]]]:
    """Return the pairs that are perturbed, each with where its perturbed factors are held.

    The experts of a layer share theirs. A factor tied to another pair's is that pair's.

    Args:
        pairs: all pairs of a model.
        trained: the parameters of an optimizer; None for those of ``carriers`` in all pairs.
        carriers: the factors to perturb, "A", "B" or both.
        whole_pairs: leave out pairs of which not all carriers can be perturbed.

    Raises:
        ValueError: no pair is left.
    """
    everything = (held(pair.slots[f]) for pair in pairs for f in carriers)
    named = "the optimizer's parameters" if trained is not None else "what the model trains"
    own_ids = {id(p) for p in (everything if trained is None else trained) if p.requires_grad}
    chosen: list[tuple[LoraPair, dict[str, Slot]]] = []
    left_out: list[str] = []
    owner: dict[int, str] = {}  # the group that perturbs a parameter
    for pair in pairs:
        own = {f: pair.slots[f] for f in carriers if id(held(pair.slots[f])) in own_ids}
        free = {
            factor: slot
            for factor, slot in own.items()
            if owner.get(id(held(slot)), pair.group) == pair.group
        }
        if len(free) < (len(carriers) if whole_pairs else 1):
            if whole_pairs or not own:
                left_out.append(pair.group)
            continue
        owner.update((id(held(slot)), pair.group) for slot in free.values())
        chosen.append((pair, free))
    target = " or ".join(carriers)
    if not chosen:
        none = f"none of {named} is factor {target} of a pair that requires a gradient"
        if whole_pairs:
            none = f'{named} hold both factors of no pair, as onto="both" needs'
        raise ValueError(
            f"the optimizer must train LoRA factors, but {none}"
            if trained is not None
            else f"model must have trainable LoRA factors, but {none}"
        )
    if left_out:
        tied = "tied to another's, " if whole_pairs else ""
        warnings.warn(
            f"factor {target} of these pairs is frozen, {tied}or not among {named}, "
            f"they train without a perturbation: {', '.join(dict.fromkeys(left_out))}",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
    return chosen


def check_whole(pairs: Sequence[LoraPair]) -> None:
    """Raise NotImplementedError where plain factors are parts of a tensor-parallel layer's."""
    for pair in pairs:
        base = pair.layer.get_base_layer()
        weight, mesh = getattr(base, "weight", None), getattr(base, "_hf_device_mesh", None)
        parts = mesh is not None and mesh.size() > 1  # transformers before 5.13
        if weight is not None and is_dtensor(weight) and not is_dtensor(pair.parameter_B):
            n, m, _ = pair.sizes
            parts |= n * m * pair.experts != weight.numel()
        if parts:
            raise NotImplementedError(
                "model must have LoRA factors that are whole on every rank, or DTensors, got parts "
                f"of {pair.group}, a tensor-parallel layer's"
            )


def check_operable(pairs: Sequence[LoraPair]) -> None:
    """Raise ValueError or TypeError unless the operators take the factors of each pair."""
    for pair in pairs:
        A, B = pair.parameter_A, pair.parameter_B
        if A.device != B.device:
            raise ValueError(
                f"model must have factors A and B of a layer on one device, got {A.device} and "
                f"{B.device} of {pair.group}"
            )
        if A.dtype != B.dtype:
            raise TypeError(
                f"model must have factors A and B of one dtype, got {A.dtype} and {B.dtype} of "
                f"{pair.group}"
            )
