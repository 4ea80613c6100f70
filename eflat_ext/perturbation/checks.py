"""Check what perturbations are given, before anything is put on a model or loaded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from eflat_ext.lora import LoraPair
from eflat_ext.ops.checks import MAX_RANK, MIN_RTOL

AVERAGE = "perturbation_ema"  # the name of an average in a state dict, under its parameter
RHO = "perturbation_rho"  # the name of the coming step's radius in an optimizer's groups


def number(value: Any) -> float:
    """Return the value as a float; NaN, which lies in no range, if it is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def check_scope(norm_scope: str) -> None:
    """Raise ValueError unless it is "layer" or "global"."""
    if norm_scope not in ("layer", "global"):
        raise ValueError(f'norm_scope: expected "layer" or "global", got {norm_scope!r}')


def check_transfer(onto: str, rtol: float | None) -> None:
    """Raise ValueError unless ``onto`` is "A", "B" or "both" and ``rtol`` None or in [1e-7, 1)."""
    if onto not in ("A", "B", "both"):
        raise ValueError(f'onto: expected "A", "B" or "both", got {onto!r}')
    if rtol is not None and not MIN_RTOL <= number(rtol) < 1:
        raise ValueError(f"rtol: expected None or a number in [{MIN_RTOL}, 1), got {rtol!r}")


def check_beta(beta: float) -> None:
    """Raise ValueError unless it is in (0, 1]."""
    if not 0 < number(beta) <= 1:
        raise ValueError(f"beta: expected a number in (0, 1], got {beta!r}")


def check_one_device(pairs: Sequence[LoraPair]) -> None:
    """Raise ValueError unless all factors are on one device: an operator's call is."""
    first = pairs[0].parameter_A.device
    for pair in pairs:
        for factor in (pair.parameter_A, pair.parameter_B):
            if factor.device != first:
                raise ValueError(
                    f"model: expected all LoRA factors on one device, got {first} of "
                    f"{pairs[0].group} and {factor.device} of {pair.group}"
                )


def check_operable(pairs: Sequence[LoraPair]) -> None:
    """Raise ValueError or TypeError unless the operators take these factors."""
    for pair in pairs:
        A, B, rank = pair.parameter_A, pair.parameter_B, pair.sizes[2]
        if rank > MAX_RANK:
            raise ValueError(
                f"model: expected LoRA factors of a rank of at most {MAX_RANK}, got {rank} of "
                f"{pair.group}"
            )
        if A.dtype != B.dtype:
            raise TypeError(
                f"model: expected factors A and B of one dtype, got {A.dtype} and {B.dtype} of "
                f"{pair.group}"
            )


def check_base(base: Optimizer, name: str = "base") -> Optimizer:
    """Return the optimizer.

    Raises:
        TypeError, ValueError: a perturbation cannot go with its steps.
    """
    kind = type(base).__name__
    if not isinstance(base, Optimizer):
        raise TypeError(f"{name}: expected a torch.optim.Optimizer, got {kind}")
    if hasattr(base, "perturbation"):
        raise TypeError(f"{name}: expected a plain optimizer, got {kind}")
    if type(base).__module__.startswith("accelerate."):
        raise TypeError(
            f"{name}: expected an optimizer as it was before accelerator.prepare, got {kind}; make "
            "this package's optimizer of it first, and prepare that"
        )
    if kind.endswith("SAM") or callable(getattr(base, "first_step", None)):
        raise TypeError(
            f"{name}: {kind} perturbs the weights itself and takes its gradients at several points "
            "of a step; expected the optimizer that it would be wrapped around"
        )
    if any(group.get("maximize") for group in base.param_groups):
        raise ValueError(
            f"{name}: expected an optimizer that minimises, got maximize=True: the perturbation "
            "goes where the loss rises; negate the loss"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name}: {kind} evaluates a closure at several points in one step, the perturbation "
            "belongs to one point; expected an optimizer whose step needs no closure"
        )
    return base


def check_saved_averages(saved: dict[Any, Tensor], wanted: dict[Any, Tensor]) -> None:
    """Raise ValueError unless there is a finite value for each average, and none besides."""
    found = wanted.keys() & saved.keys()
    if len(found) < max(len(wanted), len(saved)):
        reason = "other layers were perturbed" if found else "perhaps by another onto"
        raise ValueError(
            f"state_dict: expected a {AVERAGE} of each of the {len(wanted)} perturbed factors, "
            f"got {len(saved)}, {len(found)} of them of these: {reason}"
        )
    for key, average in wanted.items():
        value = saved[key]
        if value.shape != average.shape:
            raise ValueError(
                f"state_dict: expected a {AVERAGE} of shape {tuple(average.shape)}, "
                f"got {tuple(value.shape)}"
            )
        if not bool(torch.linalg.vector_norm(value).isfinite()):
            raise ValueError(
                f"state_dict: expected a finite {AVERAGE}, got one of shape "
                f"{tuple(value.shape)} that holds NaN or infinity"
            )
