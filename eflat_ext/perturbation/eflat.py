"""EFlat-LoRA's perturbation, apart from any optimizer.

Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eflat_ext.lora import LoraPair
from eflat_ext.reference import perturbed_factors

from .base import Gradients, Perturbation
from .bound import Bound
from .checkpoint import attach_hooks, check_saved_averages
from .operands import Operands, joined_norms, total_norm, usable, zeros_like
from .settings import Rho, Settings
from .steps import check_base
from .targets import check_operable


class TransferredPerturbation(Perturbation):
    """Perturb in the full space of weights, by the factor ``onto`` or both, with the operators."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        carriers = perturbed_factors(settings.onto, ["A"], ["B"])
        super().__init__(model, settings, carriers, whole_pairs=settings.onto == "both")

    @property
    def onto(self) -> str:
        """Factor that carries the perturbation, "B" or "A", or "both"."""
        return self.settings.onto

    @property
    def rtol(self) -> float | None:
        """Relative cut-off of a factor's singular values; None for the operators' default."""
        return self.settings.rtol

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

    It goes with an optimizer in one of four ways: within :class:`eflat_ext.EFlatLoRA`; by
    :meth:`attach`, for an optimizer that somebody else made and steps; by
    :func:`eflat_ext.engines.deepspeed.attach`; or by :meth:`update` alone, before each step of
    another engine that steps by itself.

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
        self._handles: list[Any] = []  # of what attach puts on the optimizer
        super().__init__(model, Settings(rho, onto, norm_scope, rtol, beta))

    @property
    def beta(self) -> float:
        """Weight of the newest perturbation in the average."""
        return self.settings.beta

    @property
    def averages(self) -> dict[str, Tensor]:
        """The moving average of each pair's perturbation, by pair name; live tensors.

        Onto both, the names end in ".A" and ".B".
        """
        self._claim_once()
        self.follow_parameters()
        return {
            pair.name + (f".{carrier}" if self.onto == "both" else ""): pair.part(
                carrier, factor.average
            )
            for _, pair, carrier, factor in self.targets
        }

    def attach(self, optimizer: Optimizer, *, save_state: bool = True) -> EFlatPerturbation:
        """Update before each step of an optimizer, which keeps this alive from then on.

        Each of its steps begins with :meth:`update`.

        Args:
            optimizer: any torch optimizer of the model's parameters that requires no closure.
            save_state: let the optimizer's ``state_dict`` hold the averages, and its
                ``load_state_dict`` restore them. With False, save this one's :meth:`state_dict`.

        Returns:
            This perturbation.

        Raises:
            TypeError: no optimizer, or one that the perturbation cannot go with.
            ValueError: it trains no perturbed factor of the model, or maximises; factors A and B of
                a pair are on different devices.
            NotImplementedError: factors are sharded in another layout than
                ``eflat_ext.perturbation.SUPPORTED``.
            RuntimeError: it is attached already, or has ended.
        """
        self.check()
        check_base(optimizer, "optimizer")
        self.check_free()
        self._shows_radius = save_state  # in groups that are saved, it would be state
        self.claim(optimizer)
        self.hold(attach_hooks(self, optimizer, save_state))
        return self

    def check_free(self) -> None:
        """Raise RuntimeError if it has ended, or is attached to an optimizer or an engine."""
        self.check()
        if self._handles:
            raise RuntimeError(
                "attach: this perturbation is attached to an optimizer already, or to an engine"
            )

    def hold(self, handles: list[Any]) -> None:
        """Keep the handles of hooks; :meth:`remove` removes these."""
        self._handles = handles

    def leave_optimizer(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _prepare_factors(self) -> None:
        if "A" in self._carriers:
            rows = [(t.pair, t.factor) for t in self.targets if t.carrier == "A"]
            radius = self.settings.radius(self.steps)
            self._bound = Bound(rows, self._parameters, self.norm_scope, radius)

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
    def fold_in(self, rows: Operands, adamw: dict[str, Any] | None = None) -> None:
        """Fold the perturbation of these pairs into their averages, and step their factors.

        Args:
            rows: from :meth:`operands`, of this step.
            adamw: further arguments of the operator that also takes AdamW's step; None for the one
                that does not.
        """
        parts = [pair.part(carrier, factor.average) for _, pair, carrier, factor in rows.targets]
        averages = [part.flatten(1).contiguous() for part in parts]
        by_device = rows.by_device()
        if len(by_device) == 1:
            if rows.A:
                self._skipped = self._skipped.to(rows.A[0].device)
            norms = self._average(
                rows, averages, averages, self.settings.beta, self.norm_scope, self._skipped, adamw
            )
        else:
            norms = self._average_by_device(rows, averages, by_device)
        for part, average in zip(parts, averages, strict=True):
            if not part.is_contiguous():
                part.copy_(average.view(part.shape))
        if self._bound is not None:
            self._bound.average_changed()
        self.note(rows, norms)
        self.finish_update()

    def _average(
        self,
        rows: Operands,
        averages: list[Tensor],
        into: list[Tensor],
        beta: float,
        norm_scope: str,
        skipped: Tensor,
        adamw: dict[str, Any] | None = None,
    ) -> Tensor:
        """Fold the perturbation of pairs on one device into some tensors; return the norms.

        Args:
            averages: what passes may have added to the targets, as matrices.
            into: what is averaged with the perturbation, with this beta; ``averages`` perhaps.
            skipped: counter of the pairs that are left out.
        """
        arguments: dict[str, Any] = {
            "A": rows.A,
            "B": rows.B,
            "grad_A": rows.grad_A,
            "grad_B": rows.grad_B,
            "E": self._added(rows, averages),
            "ema": into,
            "skipped": skipped,
            "scaling": rows.scaling,
            "rho": self.settings.radius(self.steps),
            "beta": beta,
            "onto": self.settings.onto,
            "norm_scope": norm_scope,
            "rtol": self.settings.rtol,
        }
        if adamw is None:
            return torch.ops.eflat.foreach_perturb_ema_(**arguments)
        return torch.ops.eflat.foreach_adamw_step_(**arguments, **adamw)

    def _average_by_device(
        self, rows: Operands, averages: list[Tensor], by_device: list[tuple[list[int], Operands]]
    ) -> Tensor:
        """Fold the perturbation of pairs on several devices into the averages; return the norms."""
        at = {(target.at, target.carrier): i for i, target in enumerate(rows.targets)}
        beta, shared = self.settings.beta, self.norm_scope == "global"
        done: list[tuple[Operands, list[Tensor], list[Tensor], Tensor]] = []
        for _, part in by_device:
            own = [averages[at[target.at, target.carrier]] for target in part.targets]
            # One norm for all is known when every device has its own: E of each pair first.
            into = [torch.zeros_like(average) for average in own] if shared else own
            skipped = self._skipped.new_zeros((), device=part.A[0].device)
            norms = self._average(part, own, into, 1.0 if shared else beta, "layer", skipped)
            self._skipped += skipped.to(self._skipped.device)
            done.append((part, own, into, norms))
        joined = joined_norms(
            [(places, norms) for (places, _), (*_, norms) in zip(by_device, done, strict=True)]
        )
        if shared:
            total = total_norm(joined)
            for part, own, into, norms in done:
                row_of = {index: row for row, index in enumerate(part.indices)}
                good = usable(norms)
                share = torch.where(good, norms / total.to(norms.device), 0)
                for target, average, E in zip(part.targets, own, into, strict=True):
                    row = row_of[target.at]
                    mean = average.lerp(E * share[row].to(E.dtype), beta)
                    average.copy_(torch.where(good[row], mean, average))
        return joined

    def _added(self, rows: Operands, averages: list[Tensor]) -> list[Tensor]:
        """Return what passes added to the targets, as matrices; an empty list if all ran clean."""
        clean = [target.factor.only_clean for target in rows.targets]
        if all(clean):
            return []
        E = []
        for (_, pair, carrier, factor), average, was_clean in zip(
            rows.targets, averages, clean, strict=True
        ):
            if was_clean:
                E.append(zeros_like(average))
            elif factor.average is factor.E:
                E.append(average)
            else:
                E.append(pair.part(carrier, factor.E).flatten(1))
        return E

    # Checkpoints.

    def saved_averages(self) -> list[Tensor]:
        self.follow_parameters()
        return [factor.average for factor in self.factors]

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
        names = {t.factor: f"{t.pair.group}.{t.carrier}" for t in self.targets}
        return [names[factor] for factor in self.factors]
