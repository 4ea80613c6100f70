"""What the optimizers are given, checked before anything is hooked to the model or loaded.

Their factories' base optimizers are made here, too: of a class, over what a model trains.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .arguments import MAX_RANK, MIN_RTOL
from .pairs import LoraPair

AVERAGE = "perturbation_ema"  # the name of an average in state_dict(), under its parameter


def check_base(base: Optimizer) -> None:
    """TypeError or ValueError unless it is one that a perturbation can be wrapped around."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"base: expected a torch.optim.Optimizer, got {type(base).__name__}")
    if type(base).__module__.startswith("accelerate."):
        raise TypeError(
            "base: expected an optimizer as it was before accelerator.prepare, got "
            f"{type(base).__name__}; make this package's optimizer of it first, and prepare that"
        )
    if all(callable(getattr(base, name, None)) for name in ("train", "eval")):
        raise TypeError(
            f"base: {type(base).__name__} moves the weights in train() and eval(), where the "
            "perturbation is, too; expected an optimizer that changes them in step() alone"
        )
    if any(group.get("maximize") for group in base.param_groups):
        raise ValueError(
            "base: expected an optimizer that minimises, got maximize=True: the perturbation goes "
            "where the loss rises; negate the loss"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base: {type(base).__name__} evaluates a closure at several points in one step, the "
            "perturbation belongs to one point; expected an optimizer whose step needs no closure"
        )


def check_transfer(onto: str, rtol: float | None) -> None:
    """ValueError unless ``onto`` is "A", "B" or "both" and ``rtol`` is None or in [1e-7, 1)."""
    if onto not in ("A", "B", "both"):
        raise ValueError(f'onto: expected "A", "B" or "both", got {onto!r}')
    if rtol is not None and not MIN_RTOL <= number(rtol) < 1:
        raise ValueError(f"rtol: expected None or a number in [{MIN_RTOL}, 1), got {rtol!r}")


def number(value: Any) -> float:
    """The value as a float; NaN, which lies in no range, if it is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def check_one_device(pairs: Sequence[LoraPair]) -> None:
    """ValueError unless all factors are on one device: an operator's call is."""
    first = pairs[0].parameter_A.device
    for pair in pairs:
        for factor in (pair.parameter_A, pair.parameter_B):
            if factor.device != first:
                raise ValueError(
                    f"model: expected all LoRA factors on one device, got {first} of "
                    f"{pairs[0].group} and {factor.device} of {pair.group}"
                )


def check_operable(pairs: Sequence[LoraPair]) -> None:
    """ValueError or TypeError unless the operators take these factors."""
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


def make_base(
    model: nn.Module, optimizer_cls: type[Optimizer], params: Any, options: dict[str, Any]
) -> Optimizer:
    """A base optimizer of ``params``, or else of all that the model trains.

    Raises:
        TypeError: ``optimizer_cls`` is an optimizer, or the model is none.
        ValueError: the model trains nothing.
    """
    if isinstance(optimizer_cls, Optimizer):
        raise TypeError(
            "optimizer_cls: expected a class of optimizers, got an instance of "
            f"{type(optimizer_cls).__name__}: EFlatLoRA(model, base) takes one as its base"
        )
    return optimizer_cls(trainable_parameters(model) if params is None else params, **options)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What a model trains.

    Raises:
        TypeError, ValueError: the model is none, or trains nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"model: expected trainable parameters, got {type(model).__name__} without any"
        )
    return trainable


def check_saved_averages(
    saved: dict[Any, Tensor], keys: Sequence[Any], averages: Sequence[Tensor]
) -> None:
    """ValueError unless there is a finite value for each average, and none besides."""
    wanted = {key: average for key, average in zip(keys, averages, strict=True) if key is not None}
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
