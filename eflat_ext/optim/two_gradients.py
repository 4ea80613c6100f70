"""Flat-LoRA and LoRA-SAM: two gradients per step, the second at perturbed weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eflat_ext.perturbation.checkpoint import initialises_state
from eflat_ext.perturbation.settings import Rho, Settings
from eflat_ext.perturbation.steps import check_base, stepping
from eflat_ext.perturbation.targets import parameters_of
from eflat_ext.perturbation.two_points import (
    FlatPerturbation,
    SAMPerturbation,
    TwoPointPerturbation,
)
from eflat_ext.stacklevel import stacklevel_of_user

from .base import PerturbingOptimizer


class TwoGradients(PerturbingOptimizer):
    """A step of two gradients: the first makes the perturbation, the second moves the weights."""

    perturbation: TwoPointPerturbation

    def __init__(self, perturbation: TwoPointPerturbation, base: Optimizer) -> None:
        super().__init__(perturbation, base)
        # What changes during a step; wrappers that copy attributes share it.
        self._step = _Step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a whole step with a closure; after :meth:`first_step`, the rest of one.

        Args:
            closure: zero_grad, forward, backward; evaluated twice, first at the clean weights. The
                gradients of the first evaluation are dropped. The base optimizer gets the first
                loss. After :meth:`first_step` and the second gradients it is evaluated once:
                Lightning's manual optimization passes one that does nothing.

        Returns:
            What the closure returned the first time, None without one.

        Raises:
            RuntimeError: no closure and no :meth:`first_step` before; a closure and a
                :meth:`first_step` without second gradients; the closure adds to gradients that were
                there before, which belong to other passes.
        """
        self.perturbation.check()
        self.perturbation.optimizers.update(stepping())
        if closure is None and not self.perturbation.pending:
            if initialises_state(self.base):
                return self._step_base()
            raise RuntimeError(
                "step() needs a closure, or first_step() before it; with Hugging Face Trainer, "
                "eflat_ext.trainer.PerturbationMixin: class MyTrainer(PerturbationMixin, "
                "Trainer)"
            )
        loss, begun = None, self.perturbation.pending and bool(self._second_gradients())
        if closure is not None and not begun:
            self._not_pending()
            with torch.enable_grad():
                loss = self._first_evaluation(closure)
        try:
            if closure is not None and not begun:
                self.first_step()
            if closure is not None:
                with torch.enable_grad():
                    second = closure()
                loss = second if begun else loss
            clean = self.perturbation.has_gradients() and not self.perturbation.ran()
            self.abandon_step()
        finally:
            self.abandon_step()  # twice: a signal may end the first one
        if clean and not self._step.warned:
            self._step.warned = True
            warnings.warn(
                "the second gradient of this step was taken without the perturbation: no LoRA "
                "layer of the model ran in training mode (model.train())",
                UserWarning,
                stacklevel=stacklevel_of_user(),
            )
        self._step_base(None if closure is None else lambda: loss)
        self.perturbation.finish_update()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Perturb training passes along the gradients there are now.

        Scaled gradients need no unscaling: a common factor leaves the perturbation alone.

        Args:
            zero_grad: also drop these gradients, for the second ones to take their place.

        Raises:
            RuntimeError: the last :meth:`first_step` has had no :meth:`second_step`.
        """
        self._not_pending()
        self.perturbation.perturb()
        if zero_grad:
            self.base.zero_grad()
        self._step.first = [] if zero_grad else self._gradients()

    def second_step(self, zero_grad: bool = False) -> None:
        """Step the base optimizer with the gradients there are now; passes are clean again.

        Args:
            zero_grad: also drop these gradients afterwards.

        Raises:
            RuntimeError: no :meth:`first_step` before.
        """
        if not self.perturbation.pending:
            raise RuntimeError("second_step() needs first_step() before it")
        self.step()
        if zero_grad:
            self.zero_grad()

    def abandon_step(self) -> None:
        """Forget a :meth:`first_step`, so that passes are clean; nothing if there was none."""
        self.perturbation.withdraw()
        self._step.first = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients.

        Dropping the second gradients abandons the step: a gradient scaler that found an overflow
        in them never calls ``step``.
        """
        if self.perturbation.pending and self._second_gradients():
            self.abandon_step()
        self._step.first = []
        self._step.zeroed = True
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.abandon_step()
        super().load_state_dict(state_dict)

    def _gradients(self) -> list[Tensor]:
        factors = self.perturbation.factors
        return [f.parameter.grad for f in factors if f.parameter.grad is not None]

    def _second_gradients(self) -> list[Tensor]:
        first = {id(gradient) for gradient in self._step.first}
        return [gradient for gradient in self._gradients() if id(gradient) not in first]

    def _first_evaluation(self, closure: Callable[[], Any]) -> Any:
        before = [(p, p.grad) for p in parameters_of(self.param_groups) if p.grad is not None]
        norms = torch._foreach_norm([grad for _, grad in before]) if before else []
        self._step.zeroed = False
        loss = closure()
        added = [norm for (p, grad), norm in zip(before, norms, strict=True) if p.grad is grad]
        # Norms are read here alone, since that waits for the device; zeros may be added to.
        if not self._step.zeroed and any(float(norm) != 0 for norm in added):
            raise RuntimeError(
                "closure must call optimizer.zero_grad() and compute all gradients of the step, as "
                "it is evaluated at two points; got one that adds to gradients that were there "
                "before, or zeroes them in place by other means. For "
                "accumulated micro-batches call first_step() and second_step()"
            )
        return loss

    def _not_pending(self) -> None:
        if self.perturbation.pending:
            raise RuntimeError(
                "the last first_step() has had no second_step(); after a step that was skipped, "
                "call optimizer.zero_grad() or optimizer.abandon_step()"
            )


class _Step:
    """Where a step of two gradients stands."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []  # gradients of the first pass that were not dropped
        self.zeroed = False  # zero_grad was called since somebody set this to False
        self.warned = False


class FlatLoRA(TwoGradients):
    """Flat-LoRA: gradient, perturbation by equations (1)-(3), second gradient there, base step.

    Either ``step(closure)``, or :meth:`first_step` and :meth:`second_step` around the second
    gradient where a closure does not fit (gradient scaler, accumulation). In between, training
    forward passes of the model run at the perturbed weights; at any other time they are clean.
    A pair whose gradients are zero, or whose norm is not finite, stays unperturbed at that step
    and is counted in ``skipped_perturbations``.

    Args and errors: see :class:`EFlatLoRA`.
    """

    perturbation: FlatPerturbation

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        *,
        rho: Rho = 0.05,
        onto: str = "B",
        norm_scope: str = "layer",
        rtol: float | None = None,
    ) -> None:
        settings = Settings(rho, onto, norm_scope, rtol)
        super().__init__(FlatPerturbation(model, settings), check_base(base))

    @property
    def onto(self) -> str:
        """Factor that carries the perturbation, "B" or "A", or "both"."""
        return self.perturbation.onto

    @property
    def rtol(self) -> float | None:
        """Relative cut-off of a factor's singular values; None for the operators' default."""
        return self.perturbation.rtol


class LoRASAM(TwoGradients):
    """LoRA-SAM: as :class:`FlatLoRA`, but A and B are each perturbed along their own gradient.

    ``A + rho G_A / v`` and ``B + rho G_B / v``, v the norm of (G_A, G_B) together: of the pair, or
    of all pairs by ``norm_scope="global"``.
    """

    def __init__(
        self, model: nn.Module, base: Optimizer, *, rho: Rho = 0.05, norm_scope: str = "layer"
    ) -> None:
        settings = Settings(rho=rho, norm_scope=norm_scope)
        super().__init__(SAMPerturbation(model, settings), check_base(base))
