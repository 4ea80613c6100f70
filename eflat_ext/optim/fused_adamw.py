"""A whole step of EFlat-LoRA around ``torch.optim.AdamW`` as one operator, where that applies.

``torch.ops.eflat.foreach_adamw_step_`` does for a list of pairs what
``foreach_perturb_ema_`` and ``AdamW.step`` do one after the other. What is in no pair is left to
the base optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.optim import AdamW, Optimizer

from eflat_ext.ops.no_kernel import has_kernel
from eflat_ext.perturbation.dtensors import is_dtensor

_Numbers: TypeAlias = tuple[float, float, float, float, float]


_STATE = ("exp_avg", "exp_avg_sq", "step")
_NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")


def adamw_arguments(base: Optimizer, factors: Sequence[Tensor]) -> dict[str, Any] | None:
    """Return the operator's arguments for ``base.step()`` of the parameters of some pairs, by name.

    None where no kernel can do that step: ``base`` is no plain AdamW, or has step hooks,
    which may read the gradients; a factor is not trained, has no gradient or no state yet, or is
    sharded; factors or steps occur twice; tensors that are not dense and contiguous on one device.

    Args:
        base: the optimizer.
        factors: the parameters of A of the pairs, then those of B, as in the lists returned.
    """
    if type(base) is not AdamW or base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None
    own = vars(base).get("step")  # a scheduler's wrapper, which only sees that it is called
    if own and not (hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is AdamW.step):
        return None
    if not factors or len(set(map(id, factors))) < len(factors):
        return None
    if any(type(factor) is not Parameter and is_dtensor(factor) for factor in factors):
        return None
    device = factors[0].device
    if not has_kernel("foreach_adamw_step_", device):
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
    of_state = zip(_STATE, map(list, zip(*tensors, strict=True)), strict=True)
    of_groups = zip(_NUMBERS, map(list, zip(*chosen, strict=True)), strict=True)
    return dict([*of_state, *of_groups])


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


def _numbers(group: dict[str, Any]) -> _Numbers | None:
    """Return a group's hyperparameters; None unless it is one of plain AdamW."""
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
        and all(
            moment.dtype == factor.dtype
            and moment.device == factor.device
            and moment.is_contiguous()
            for moment in (state["exp_avg"], state["exp_avg_sq"])
        )
        and step.dtype == torch.float32
        and step.dim() == 0
        and (step.device == factor.device or step.device.type == "cpu")
    )
