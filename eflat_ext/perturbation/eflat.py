"""EFlat-LoRA's perturbation, apart from any optimizer.

Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eflat_ext.lora import LoraPair
from eflat_ext.ops.checks import perturbed

from .base import Gradients, Perturbation, Rho
from .bound import Bound
from .checkpoint import attach_hooks
from .checks import check_base, check_beta, check_operable, check_saved_averages, check_transfer
from .layer_forward import PerturbedFactor
from .operands import Operands, zeros_like

if TYPE_CHECKING:
    from eflat_ext.optim.fused_adamw import AdamWLists


class TransferredPerturbation(Perturbation):
    """A full-space perturbation, carried over to the factor ``onto``, or both, by the operators."""

    def __init__(
        self, model: nn.Module, *, rho: Rho, onto: str, norm_scope: str, rtol: float | None
    ) -> None:
        check_transfer(onto, rtol)
        self._onto, self._rtol = onto, rtol
        carriers = perturbed(onto, ["A"], ["B"])
        together = onto == "both"
        super().__init__(model, carriers, rho=rho, norm_scope=norm_scope, together=together)

    @property
    def onto(self) -> str:
        """The factor that carries the perturbation, "B" or "A", or "both"."""
        return self._onto

    @property
    def rtol(self) -> float | None:
        """Relative cut-off of a factor's singular values; None for the operators' default."""
        return self._rtol

    def _check(self, pairs: Sequence[LoraPair]) -> None:
        super()._check(pairs)
        check_operable(pairs)


class EFlatPerturbation(TransferredPerturbation):
    """Perturb training forward passes by a moving average of full-space perturbations.

    Training passes of the model's LoRA layers run at ``B + average`` (``A + average`` for
    ``onto="A"``, scaled down until its full-space norm is at most rho; both for ``onto="both"``);
    no parameter is ever written. :meth:`update` folds the perturbation of equations (1)-(3), of the
    current gradients and the factors where they were taken, into the average. A pair whose
    gradients are zero, or whose norm is not finite, keeps its average bit for bit and is counted in
    ``skipped``. Averages are float32 (float64 for float64 factors), shaped like their factors, and
    whole on every rank. Each expert of a layer counts as a layer of its own.

    It goes with an optimizer in one of three ways: within :class:`eflat_ext.EFlatLoRA`; by
    :meth:`attach`, for an optimizer that somebody else made and steps; or by :meth:`update` alone,
    before each step of an engine that steps by itself.

    Args:
        model: a PEFT model with LoRA layers.
        rho: radius, in units of the weights: a finite number >= 0 or a callable of the number of
            completed steps. It may be assigned between steps; it is not in ``state_dict``.
        beta: weight of the newest perturbation in the average, in (0, 1].
        onto: the factor that carries the perturbation, "B" or "A", or "both", which is not the
            paper's: see :func:`eflat_ext.ops.foreach_perturb`. Pairs of which one factor is frozen
            or tied to another's train without a perturbation then.
        norm_scope: "layer" gives every pair the radius rho, "global" all pairs together.
        rtol: relative singular value below which a factor's direction counts as zero, in
            [1e-7, 1); None for the default of the operators.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: ``model`` is no module.
        ValueError: an argument out of range; the model has no LoRA pair.
        NotImplementedError: the model is sharded by the older FSDP.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: Rho = 0.05,
        beta: float = 0.9,
        onto: str = "B",
        norm_scope: str = "layer",
        rtol: float | None = None,
    ) -> None:
        check_beta(beta)
        self._beta = float(beta)
        self._bound: Bound | None = None
        self._handles: list[Any] = []  # of what attach puts on the optimizer
        super().__init__(model, rho=rho, onto=onto, norm_scope=norm_scope, rtol=rtol)

    @property
    def beta(self) -> float:
        """Weight of the newest perturbation in the average."""
        return self._beta

    @property
    def averages(self) -> dict[str, Tensor]:
        """The moving average of each pair's perturbation, by pair name; live tensors.

        Onto both, the names end in ".A" and ".B".
        """
        self._claim_once()
        self.fit_factors()
        targets = self._targets(range(len(self.pairs)))
        names = [self.pairs[i].name + (f".{f}" if self.onto == "both" else "") for f, i in targets]
        parts = self.perturbed_parts(range(len(self.pairs)), _average)
        return dict(zip(names, parts, strict=True))

    def attach(self, optimizer: Optimizer) -> EFlatPerturbation:
        """Ride on the steps of an optimizer, which keeps this alive from then on.

        Each of its steps begins with :meth:`update`; its ``state_dict`` holds the averages, and its
        ``load_state_dict`` restores them.

        Args:
            optimizer: any torch optimizer of the model's parameters that requires no closure.

        Returns:
            This perturbation.

        Raises:
            TypeError: no optimizer, or one that the perturbation cannot go with.
            ValueError: it trains no perturbed factor of the model, or maximises; factors on several
                devices, or of a rank above 256.
            NotImplementedError: factors are sharded in another layout than
                ``eflat_ext.perturbation.SUPPORTED``.
            RuntimeError: it is attached already, or has ended.
        """
        self.check()
        check_base(optimizer, "optimizer")
        if self._handles:
            raise RuntimeError("attach: this perturbation is attached to an optimizer already")
        self.claim(optimizer)
        self._handles = attach_hooks(self, optimizer)
        return self

    def leave_optimizer(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _prepare_factors(self) -> None:
        if "A" in self._carriers:
            rows = [(self.pairs[i], self._factor_of[i]["A"]) for i in range(len(self.pairs))]
            self._bound = Bound(rows, self._parameters, self.norm_scope, self.radius())

    @torch.no_grad()
    def update(self, gradients: Gradients | None = None) -> None:
        """Update the averages from the current gradients.

        Args:
            gradients: by parameter; None for ``parameter.grad``. Scaling all of them by one
                constant, as a loss scale does, has no effect.

        Raises:
            RuntimeError: it has ended; or the model's parameters are no longer those that its
                optimizer trains.
        """
        self.fold_in(self.operands(gradients))

    @torch.no_grad()
    def fold_in(self, rows: Operands, adamw: AdamWLists | None = None) -> None:
        """Fold the perturbation of these pairs into their averages, and step their factors.

        Args:
            rows: from :meth:`operands`, of this step.
            adamw: for the operator that also takes AdamW's step; None for none.
        """
        if rows.A:
            self._skipped_on(rows.A[0].device)
        parts = self.perturbed_parts(rows.indices, _average)
        averages = [part.flatten(1).contiguous() for part in parts]
        E = self._added(rows, averages)
        radius = (rows.scaling, self.radius(), self.beta)
        options = (self.onto, self.norm_scope, self.rtol)
        if adamw is None:
            norms = torch.ops.eflat.foreach_perturb_ema_(
                *rows.lists, E, averages, self._skipped, *radius, *options
            )
        else:
            norms = torch.ops.eflat.foreach_adamw_step_(
                *rows.lists, E, averages, *adamw[:3], self._skipped, *radius, *adamw[3:], *options
            )
        for part, average in zip(parts, averages, strict=True):
            if not part.is_contiguous():
                part.copy_(average.view(part.shape))
        if self._bound is not None:
            self._bound.average_changed()
        self.note(rows, norms)
        self.finish_update()

    def _added(self, rows: Operands, averages: list[Tensor]) -> list[Tensor]:
        """Return what the passes added to the pairs' factors; an empty list if all ran clean."""
        factors = [self._factor_of[i][carrier] for carrier, i in self._targets(rows.indices)]
        if all(factor.only_clean for factor in factors):
            return []
        parts = self.perturbed_parts(rows.indices, lambda factor: factor.E)
        return [
            zeros_like(average)
            if factor.only_clean
            else average
            if factor.average is factor.E
            else part.flatten(1)
            for factor, part, average in zip(factors, parts, averages, strict=True)
        ]

    @torch.no_grad()
    def finish_step(self) -> None:
        if self._bound is not None and self._claimed and not self.ended:
            self._bound.update()

    def _radius_changed(self) -> None:
        super()._radius_changed()
        if self._bound is not None:
            with suppress(Exception):
                self._bound.radius = self.radius()

    # Checkpoints.

    def saved_averages(self) -> list[Tensor]:
        self.fit_factors()
        return [factor.average for factor in self.factors]

    def load_averages(self, values: Sequence[Tensor | None]) -> None:
        super().load_averages(values)
        if self._bound is not None:
            self._bound.average_changed()
            self.finish_step()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, by factor, and the counters, for engines that save them."""
        self._claim_once()
        averages = dict(zip(self._names(), self.saved_averages(), strict=True))
        return {"averages": averages, "steps": self.steps, "skipped": int(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: other factors were perturbed, shapes differ, or an average is not finite;
                nothing has been loaded then.
        """
        self._claim_once()
        saved, names = state_dict["averages"], self._names()
        check_saved_averages(saved, dict(zip(names, self.saved_averages(), strict=True)))
        self.load_averages([saved[name] for name in names])
        self.load_counters(state_dict["steps"], state_dict["skipped"])

    def _names(self) -> list[str]:
        names: dict[int, str] = {}
        for carrier, i in self._targets(range(len(self.pairs))):
            factor = self._factor_of[i][carrier]
            names.setdefault(id(factor), f"{self.pairs[i].group}.{carrier}")
        return [names[id(factor)] for factor in self.factors]


def _average(factor: PerturbedFactor) -> Tensor:
    return factor.average
