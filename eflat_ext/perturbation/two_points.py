"""The perturbations of Flat-LoRA and LoRA-SAM, made from one gradient for the next one.

Flat-LoRA: Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3). LoRA-SAM, its peer,
perturbs the factors as SAM (Foret et al., arXiv 2010.01412) perturbs weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Perturbation
from .eflat import TransferredPerturbation
from .operands import Operands
from .settings import Settings


class TwoPointPerturbation(Perturbation):
    """Perturb training passes from :meth:`perturb` to :meth:`withdraw`, and no others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._switch.on = False

    @torch.no_grad()
    def perturb(self) -> None:
        """Compute the perturbation from the current gradients and apply it in training passes.

        Raises:
            RuntimeError: it has ended; or the model's parameters are no longer those that its
                optimizer trains.
        """
        rows = self.operands()
        E, norms = self._made(rows)
        self._skipped = self._skipped.to(norms.device).add_((~_usable(norms)).sum())
        self.note(rows, norms)
        for factor in self.factors:
            factor.E.zero_()
        for (_, pair, carrier, factor), e in zip(rows.targets, E, strict=True):
            part = pair.part(carrier, factor.E)
            part.copy_(e.view(part.shape))
        self.forget_passes()
        self._switch.on = True

    def withdraw(self) -> None:
        """Stop perturbing training passes. No effect if none is applied."""
        self._switch.on = False
        self.forget_passes()

    @property
    def pending(self) -> bool:
        """True between :meth:`perturb` and :meth:`withdraw`."""
        return self._switch.on

    def ran(self) -> bool:
        """Return whether a pass has been perturbed since :meth:`perturb`."""
        return any(factor.ran_perturbed for factor in self.factors)

    def _made(self, rows: Operands) -> tuple[list[Tensor], Tensor]:
        """Return E for each perturbed factor of the pairs, as matrices, and the pairs' norms."""
        raise NotImplementedError  # abstract: what the methods differ in

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


class FlatPerturbation(TwoPointPerturbation, TransferredPerturbation):
    """Flat-LoRA's: equations (1)-(3), without averaging."""

    def _made(self, rows: Operands) -> tuple[list[Tensor], Tensor]:
        return torch.ops.eflat.foreach_perturb(
            A=rows.A,
            B=rows.B,
            grad_A=rows.grad_A,
            grad_B=rows.grad_B,
            scaling=rows.scaling,
            rho=self.settings.radius(self.steps),
            onto=self.settings.onto,
            norm_scope=self.settings.norm_scope,
            rtol=self.settings.rtol,
        )


class SAMPerturbation(TwoPointPerturbation):
    """LoRA-SAM's: ``rho G_A / v`` and ``rho G_B / v``, v the norm of (G_A, G_B) together."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__(model, settings, ["A", "B"])

    def _made(self, rows: Operands) -> tuple[list[Tensor], Tensor]:
        if not rows.indices:
            return [], torch.zeros(0, device=self._skipped.device)
        norm_A, norm_B = (  # in float32 the squares of tiny gradients are zero
            torch.stack(torch._foreach_norm(list(grads), 2, torch.float64))
            for grads in (rows.grad_A, rows.grad_B)
        )
        norms = torch.hypot(norm_A, norm_B)
        good = _usable(norms)
        shared = torch.where(good, norms, 0).norm() if self.norm_scope == "global" else norms
        scale = torch.where(good, self.settings.radius(self.steps) / shared, 0)
        row_of = {index: row for row, index in enumerate(rows.indices)}
        E = []
        for target in rows.targets:
            row = row_of[target.at]
            gradient = (rows.grad_A if target.carrier == "A" else rows.grad_B)[row]
            # In float64: for a tiny gradient the scale is beyond float32's range.
            e = (gradient.double() * scale[row]).to(gradient.dtype)
            E.append(torch.where(good[row], e, 0))
        return E, norms


def _usable(norms: Tensor) -> Tensor:
    """Return which norms are neither zero nor infinite nor NaN."""
    return norms.isfinite() & (norms > 0)
