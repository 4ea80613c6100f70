"""The perturbations of Flat-LoRA and LoRA-SAM, made from one gradient for the next one.

Flat-LoRA: Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3). LoRA-SAM, its peer,
perturbs the factors as SAM (Foret et al., arXiv 2010.01412) perturbs weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eflat_ext.ops.no_kernel import has_float64

from .base import Perturbation
from .eflat import TransferredPerturbation
from .operands import Operands, joined_norms, total_norm, usable
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
        self._skipped = self._skipped.to(norms.device).add_((~usable(norms)).sum())
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
        by_device = rows.by_device()
        if len(by_device) == 1:
            return self._perturbations(rows, self.norm_scope)
        at = {(target.at, target.carrier): i for i, target in enumerate(rows.targets)}
        made = [self._perturbations(part, "layer") for _, part in by_device]
        joined = joined_norms(
            [(places, norms) for (places, _), (_, norms) in zip(by_device, made, strict=True)]
        )
        E: list[Tensor] = [joined] * len(rows.targets)
        for (_, part), (own, norms) in zip(by_device, made, strict=True):
            row_of = {index: row for row, index in enumerate(part.indices)}
            share = torch.ones_like(norms)
            if self.norm_scope == "global":
                total = total_norm(joined).to(norms.device)
                share = torch.where(usable(norms), norms / total, 0)
            for target, e in zip(part.targets, own, strict=True):
                E[at[target.at, target.carrier]] = e * share[row_of[target.at]].to(e.dtype)
        return E, joined

    def _perturbations(self, rows: Operands, norm_scope: str) -> tuple[list[Tensor], Tensor]:
        return torch.ops.eflat.foreach_perturb(
            A=rows.A,
            B=rows.B,
            grad_A=rows.grad_A,
            grad_B=rows.grad_B,
            scaling=rows.scaling,
            rho=self.settings.radius(self.steps),
            onto=self.settings.onto,
            norm_scope=norm_scope,
            rtol=self.settings.rtol,
        )


class SAMPerturbation(TwoPointPerturbation):
    """LoRA-SAM's: ``rho G_A / v`` and ``rho G_B / v``, v the norm of (G_A, G_B) together."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        super().__init__(model, settings, ["A", "B"])

    def _made(self, rows: Operands) -> tuple[list[Tensor], Tensor]:
        if not rows.indices:
            return [], torch.zeros(0, device=self._skipped.device)
        first = rows.grad_A[0].device
        # In float32 the squares of tiny gradients are zero.
        types = {gradient.device.type for gradient in rows.grad_A}
        wide = torch.float64 if all(map(has_float64, types)) else torch.float32
        norm_A, norm_B = (
            torch.stack([n.to(first) for n in torch._foreach_norm(list(grads), 2, wide)])
            for grads in (rows.grad_A, rows.grad_B)
        )
        norms = torch.hypot(norm_A, norm_B)
        good = usable(norms)
        shared = torch.where(good, norms, 0).norm() if self.norm_scope == "global" else norms
        scale = torch.where(good, self.settings.radius(self.steps) / shared, 0)
        row_of = {index: row for row, index in enumerate(rows.indices)}
        E = []
        for target in rows.targets:
            row = row_of[target.at]
            gradient = (rows.grad_A if target.carrier == "A" else rows.grad_B)[row]
            # For a tiny gradient the scale is beyond float32's range.
            own_scale, moves = scale[row].to(gradient.device), good[row].to(gradient.device)
            e = (gradient.to(wide) * own_scale).to(gradient.dtype)
            E.append(torch.where(moves, e, 0))
        return E, norms
