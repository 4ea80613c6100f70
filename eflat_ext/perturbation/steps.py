"""Tell steps of a perturbation's own optimizers from those of others."""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from eflat_ext.stacklevel import stacklevel_of_user

from .targets import parameters_of

if TYPE_CHECKING:
    from .claims import ClaimedFactors

living: weakref.WeakSet[ClaimedFactors] = weakref.WeakSet()
_watching: list[Any] = []


def watch() -> None:
    """Let a foreign optimizer that steps perturbed parameters end their perturbation."""
    if not _watching:
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
