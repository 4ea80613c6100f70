"""EFlat-LoRA as an optimizer around any torch optimizer.

EFlat-LoRA: Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eflat_ext.perturbation import EFlatPerturbation
from eflat_ext.perturbation.checkpoint import initialises_state
from eflat_ext.perturbation.settings import Rho
from eflat_ext.perturbation.steps import check_base

from .base import PerturbingOptimizer
from .fused_adamw import adamw_arguments, without_gradients


class EFlatLoRA(PerturbingOptimizer):
    """EFlat-LoRA: one gradient per step, taken at weights perturbed by a moving average.

    Training forward passes of the model run at ``B + average``, see
    :class:`eflat_ext.EFlatPerturbation`; nothing but the base optimizer writes a parameter.
    ``step`` folds the perturbation of equations (1)-(3), computed from the gradients and the
    factors where they were taken, into the average, and lets the base optimizer step. So gradients
    accumulated over micro-batches belong to one perturbed point, and whatever reads weights finds
    the clean ones at any time.

    Args:
        model: a PEFT model with LoRA layers.
        base: the optimizer of its trainable parameters.
        rho, beta, onto, norm_scope, rtol: see :class:`eflat_ext.EFlatPerturbation`.
        fused_step: use the fused operator where it applies: around a plain
            ``torch.optim.AdamW``, one operator does the whole step of all pairs, in float32 for
            factors of up to 32 bits. May be assigned between steps.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: ``model`` is no module; ``base`` is no optimizer, one of this package, one that
            needs a closure (LBFGS) or perturbs weights itself (SAM); factors A and B of a pair have
            different dtypes.
        ValueError: an argument out of range; ``base`` maximises; nothing to perturb; factors A and
            B of a pair are on different devices.
        NotImplementedError: the model is sharded by the older FSDP, or its factors in another
            layout than ``eflat_ext.perturbation.SUPPORTED``.
    """

    perturbation: EFlatPerturbation

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        *,
        rho: Rho = 0.05,
        beta: float = 0.9,
        onto: str = "B",
        norm_scope: str = "layer",
        rtol: float | None = None,
        fused_step: bool = True,
    ) -> None:
        base = check_base(base)
        super().__init__(EFlatPerturbation(model, rho, beta, onto, norm_scope, rtol), base)
        self._fused = {"step": fused_step}  # wrappers that copy attributes share it

    @property
    def fused_step(self) -> bool:
        """True if the fused operator is used where it applies."""
        return self._fused["step"]

    @fused_step.setter
    def fused_step(self, fused: bool) -> None:
        self._fused["step"] = fused

    @property
    def beta(self) -> float:
        """Weight of the newest perturbation in the average."""
        return self.perturbation.beta

    @property
    def onto(self) -> str:
        """Factor that carries the perturbation, "B" or "A", or "both"."""
        return self.perturbation.onto

    @property
    def rtol(self) -> float | None:
        """Relative cut-off of a factor's singular values; None for the operators' default."""
        return self.perturbation.rtol

    @property
    def averages(self) -> dict[str, Tensor]:
        """See :attr:`eflat_ext.EFlatPerturbation.averages`."""
        return self.perturbation.averages

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        If the base optimizer raises, the averages have taken this step's perturbation already, and
        the pairs their step where the fused operator applies.

        Args:
            closure: evaluated once, at the perturbed weights: zero_grad, forward, backward. The
                base optimizer gets the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError: the perturbation has ended (a newer optimizer took over, or another one
                stepped its weights), or the model's parameters were replaced.
        """
        self.perturbation.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        elif not self.base.state and initialises_state(self.base):
            return self._step_base()
        rows = self.perturbation.operands()
        adamw = adamw_arguments(self.base, rows.parameters) if self._fused["step"] else None
        self.perturbation.fold_in(rows, adamw)
        with without_gradients(rows.parameters if adamw is not None else []):
            self._step_base(None if closure is None else lambda: loss)
        self.perturbation.finish_step()
        return loss
