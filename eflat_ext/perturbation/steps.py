"""Check optimizers, and tell steps of a perturbation's own ones from those of others."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from eflat_ext.stacklevel import stacklevel_of_user

from .targets import parameters_of

living: weakref.WeakSet[Any] = weakref.WeakSet()  # of ClaimedFactors
_watching: list[Any] = []
_LIGHTNING = ("lightning.", "lightning_fabric.", "pytorch_lightning.")


def check_base(base: Optimizer, name: str = "base") -> Optimizer:
    """Return an optimizer that a perturbation can go with.

    Raises:
        TypeError, ValueError: it cannot go with this one's steps.
    """
    kind = type(base).__name__
    if not isinstance(base, Optimizer):
        raise TypeError(f"{name} must be a torch.optim.Optimizer, got {kind}")
    if hasattr(base, "perturbation"):
        raise TypeError(f"{name} must be a plain optimizer, got {kind}")
    if type(base).__module__.startswith("accelerate."):
        raise TypeError(
            f"{name} must be an optimizer as it was before accelerator.prepare, got {kind}; make "
            "this package's optimizer of it first, and prepare that"
        )
    if type(base).__module__.startswith(_LIGHTNING):
        raise TypeError(
            f"{name} must be the optimizer inside the wrapper of Lightning or Fabric, which is its "
            f"attribute optimizer, got {kind}"
        )
    if kind.endswith("SAM") or callable(getattr(base, "first_step", None)):
        raise TypeError(
            f"{name} must be an optimizer of one gradient per step: {kind} perturbs the weights "
            "itself and takes several; give the optimizer that it would be wrapped around"
        )
    if not hasattr(base, "param_groups"):
        raise TypeError(f"{name} must be an optimizer with param_groups, got {kind} without")
    if callable(getattr(base, "fused_backward", None)):
        raise TypeError(
            f"{name} must be an optimizer that steps after the backward pass: {kind} steps each "
            "parameter within it"
        )
    if any(group.get("maximize") for group in base.param_groups):
        raise ValueError(
            f"{name} must minimise, got maximize=True: the perturbation goes where the loss rises; "
            "negate the loss"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name} must be an optimizer whose step needs no closure: {kind} evaluates a closure "
            "at several points in one step, the perturbation belongs to one point"
        )
    return base


def watch() -> None:
    """Let a foreign optimizer that steps perturbed parameters end their perturbation.

    A step of an engine that no perturbation is attached to is an error.
    """
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_before_any_step))
        _watching.append(register_optimizer_step_post_hook(_after_any_step))


def stepping() -> list[Any]:
    """Return the optimizers whose steps are under way.

    From the stack: a flag that hooks set would stay set, since torch skips the hooks after a step
    that raises.
    """
    found: list[Any] = []
    frame: Any = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if frame.f_code.co_name == "wrapper" and module == Optimizer.__module__:
            found += frame.f_locals.get("args", ())[:1]
        frame = frame.f_back
    return found


def _before_any_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    waiting = [
        one
        for one in living
        if optimizer not in one.optimizers and any(factor.ran_perturbed for factor in one.factors)
    ]
    engine = stepping_engine() if waiting else None
    if engine is None:
        return
    stepped = set(map(id, engine.module.parameters()))
    if any(stepped & one.parameter_ids() for one in waiting):
        raise RuntimeError(
            "passes of the engine's model are perturbed, and the engine's step does not update the "
            "perturbation: attach it by eflat_ext.engines.deepspeed.attach(engine, perturbation)"
        )


def stepping_engine() -> Any:
    """Return the DeepSpeed engine whose optimizer step is under way; None if there is none."""
    module = "deepspeed.runtime.engine"
    frame: Any = sys._getframe() if module in sys.modules else None
    while frame is not None:
        here = frame.f_code.co_name, frame.f_globals.get("__name__")
        if here == ("_take_model_step", module):
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None


def _after_any_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    for one in [one for one in living if optimizer not in one.optimizers]:
        stepped = {id(p) for p in parameters_of(optimizer.param_groups) if p.grad is not None}
        if not stepped & one.parameter_ids() or not one.optimizers.isdisjoint(stepping()):
            continue  # nothing of its, or a step within its own optimizer's
        if any(isinstance(x, Optimizer) and x in one.optimizers for x in vars(optimizer).values()):
            continue  # around its own optimizer, which it did not step this time
        if not one.attached and one.steps and one.steps_of.get(optimizer) != one.steps:
            one.steps_of[optimizer] = one.steps  # updated by hand before each step
            continue
        reason = f"{type(optimizer).__name__} stepped weights that it perturbs"
        one.end(reason)
        warnings.warn(
            f"LoRA weights are not perturbed any more: {reason}, and is not its optimizer",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
