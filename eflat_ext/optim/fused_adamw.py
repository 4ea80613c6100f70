"""A whole step of EFlat-LoRA around ``torch.optim.AdamW`` as one operator, where that applies.

``torch.ops.eflat.foreach_adamw_step_`` does for a list of pairs what
``foreach_perturb_ema_`` and ``AdamW.step`` do one after the other. What is in no pair is left to
the base optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from eflat_ext.perturbation.dtensors import is_dtensor

_DEVICES = ("cpu", "cuda")  # that have a kernel for it
# lr, beta1, beta2, eps, weight_decay
_Numbers: TypeAlias = tuple[float, float, float, float, float]


class AdamWLists(NamedTuple):
    """AdamW's arguments of the operator: for every A of the pairs, then for every B."""

    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    step: list[Tensor]
    lr: list[float]
    beta1: list[float]
    beta2: list[float]
    eps: list[float]
    weight_decay: list[float]


def adamw_lists(base: Optimizer, factors: Sequence[Tensor]) -> AdamWLists | None:
    """Return what the operator needs to do ``base.step()`` for the parameters of some pairs.

    None where it cannot: ``base`` is no plain AdamW, or has step hooks, which may look at the
    gradients; a factor is not trained, has no gradient or no state yet, or is sharded; factors or
    steps occur twice; tensors that are not dense and contiguous on one device.

    Args:
        base: the optimizer.
        factors: the parameters of A of the pairs, then those of B.
    """
    if type(base) is not AdamW or not _own_step(base) or _has_hooks(base):
        return None
    if not factors or any(map(is_dtensor, factors)) or len(set(map(id, factors))) < len(factors):
        return None
    device = factors[0].device
    if device.type not in _DEVICES:
        return None
    numbers_of: dict[int, _Numbers | None] = {}
    for group in base.param_groups:
        numbers = _numbers(group)
        numbers_of.update((id(parameter), numbers) for parameter in group["params"])
    tensors: list[tuple[Tensor, Tensor, Tensor]] = []
    chosen: list[_Numbers] = []
    for factor in factors:
        numbers, state = numbers_of.get(id(factor)), base.state.get(factor)
        if numbers is None or not state or factor.device != device or not _usable(factor, state):
            return None
        moments = (state[name].flatten(1) for name in ("exp_avg", "exp_avg_sq"))
        tensors.append((*moments, state["step"]))
        chosen.append(numbers)
    if len({id(step) for _, _, step in tensors}) < len(tensors):
        return None
    return AdamWLists(*map(list, zip(*tensors, strict=True)), *map(list, zip(*chosen, strict=True)))


@contextmanager
def without_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Make a context in which the parameters have no gradients, so that no optimizer steps them."""
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _own_step(base: AdamW) -> bool:
    """Whether ``base.step`` is AdamW's, as it is or as a scheduler wraps it to see it called."""
    step = vars(base).get("step")
    scheduled = hasattr(step, "_wrapped_by_lr_sched")
    return step is None or (scheduled and step.__wrapped__ is AdamW.step)


def _has_hooks(base: AdamW) -> bool:
    return bool(base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks)


def _numbers(group: dict[str, Any]) -> _Numbers | None:
    """A group's hyperparameters, None unless it is one of plain AdamW."""
    if any(group[name] for name in ("amsgrad", "maximize", "capturable", "differentiable")):
        return None
    if not group["decoupled_weight_decay"]:
        return None
    numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        return None  # a tensor, perhaps
    lr, beta1, beta2, eps, _ = numbers
    return numbers if lr >= 0 and 0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 else None


def _usable(factor: Tensor, state: dict[str, Any]) -> bool:
    grad, step = factor.grad, state["step"]
    return (
        grad is not None
        and grad.layout == torch.strided
        and factor.is_contiguous()
        and _like(state["exp_avg"], factor)
        and _like(state["exp_avg_sq"], factor)
        and step.dtype == torch.float32
        and step.dim() == 0
        and (step.device == factor.device or step.device.type == "cpu")
    )


def _like(moment: Tensor, factor: Tensor) -> bool:
    return (
        moment.dtype == factor.dtype and moment.device == factor.device and moment.is_contiguous()
    )
