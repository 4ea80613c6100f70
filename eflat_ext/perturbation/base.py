"""Perturb factors of LoRA pairs in training forward passes: the base of all methods."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eflat_ext.stacklevel import stacklevel_of_user

from .bound import Bound
from .claims import ClaimedFactors
from .dtensors import gathered, is_dtensor, laid_out_as
from .operands import Operands, collect
from .settings import RHO, Rho, Settings
from .steps import stepping

Gradients: TypeAlias = Mapping[Any, Tensor]


class Perturbation(ClaimedFactors):
    """Add a tensor to some factors of a model's LoRA pairs in training forward passes.

    Args:
        model, carriers, whole_pairs: see :class:`ClaimedFactors`.
        settings: rho, norm_scope and, for some methods, the others.

    Attributes:
        settings: as given; assigning :attr:`rho` replaces them.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        carriers: Sequence[str],
        *,
        whole_pairs: bool = False,
    ) -> None:
        settings.radius(0)  # raises what a schedule raises
        self.settings = settings
        self._bound: Bound | None = None
        self._shows_radius = True
        super().__init__(model, carriers, whole_pairs)
        self._warned = False
        device = self.pairs[0].parameter_A.device
        with torch.inference_mode(False):
            self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._norms: tuple[list[int], Tensor] = ([], torch.zeros(0, device=device))

    @property
    def rho(self) -> Rho:
        """Radius of the perturbation: a number, or a callable of the completed steps."""
        return self.settings.rho

    @rho.setter
    def rho(self, rho: Rho) -> None:
        settings = dataclasses.replace(self.settings, rho=rho)
        settings.radius(self.steps)
        self.settings = settings
        self._radius_changed()
        self.finish_step()

    @property
    def norm_scope(self) -> str:
        """Scope of rho: "layer" (each pair) or "global" (all pairs together)."""
        return self.settings.norm_scope

    @property
    def skipped(self) -> Tensor:
        """Number of times a pair got no new perturbation: its norm was zero or not finite.

        An int64 tensor without dimensions; reading its value synchronises with the device.
        """
        return self._skipped

    @property
    def norms(self) -> dict[str, Tensor]:
        """Norm of each pair's gradient at the last update, before rho; tensors without dimensions.

        By pair name; pairs without a gradient at that update are missing.
        """
        indices, norms = self._norms
        return {self.pairs[i].name: norm for i, norm in zip(indices, norms.unbind(), strict=True)}

    def points(self) -> dict[Tensor, Tensor]:
        """Return the pairs' factors where the next gradients will be taken: copies, whole."""
        self._claim_once()
        self.follow_parameters()
        points: dict[Tensor, Tensor] = {}
        with torch.no_grad():
            parameters = list(self._parameters.values())
            for parameter, whole in zip(parameters, gathered(parameters), strict=True):
                whole = whole.full_tensor() if is_dtensor(whole) else whole
                points[parameter] = whole.detach().clone()
            on = self._switch.on and not self._switch.cleaned and not self.ended
            for factor in self.factors if on else ():
                if not factor.parameter.requires_grad:  # passes leave it alone
                    continue
                if factor.refresh is not None:
                    factor.refresh(factor)
                points[factor.parameter] = factor.point(points[factor.parameter])
        return points

    def claim(self, optimizer: Optimizer | None = None) -> None:
        super().claim(optimizer)
        self._radius_changed()

    def end(self, reason: str) -> None:
        claimant = None if self.ended else self.claimant()
        super().end(reason)
        for group in claimant.param_groups if claimant is not None else ():
            group.pop(RHO, None)

    @torch.no_grad()
    def put(self, E: Mapping[Any, Tensor]) -> None:
        """Set the tensors that training passes add; zeros for factors that are not named.

        Args:
            E: by parameter, shaped like it.
        """
        self.check()
        self._claim_once()
        self.follow_parameters()
        for factor in self.factors:
            value = E.get(factor.parameter)
            factor.E.zero_() if value is None else factor.E.copy_(value)
        self.forget_passes()

    def operands(self, gradients: Gradients | None = None) -> Operands:
        """Return the operators' arguments for this step.

        Args:
            gradients: by parameter; None for ``parameter.grad``.

        Raises:
            RuntimeError: it has ended; or the model's parameters are no longer those that its
                optimizer trains.
        """
        radius = self.settings.radius(self.steps)  # what it raises comes before anything moves
        if not self._claimed:
            self._claim_once()
        self.check()
        self.follow_parameters()
        self._check_parameters()
        self.optimizers.update(stepping())  # around this call: its own ones
        for layer in self._layers:  # another library may have put its own forward pass there
            if layer.layer.forward is not layer.forward and not layer.in_place():
                layer.wrap()
        found = collect(self.pairs, self.targets, self._parameters, gradients)
        having = found.having
        perturbed = radius and self.steps and self._switch.on and not self._switch.cleaned
        if perturbed and not self._warned:
            clean = [t.pair.name for t in found.targets if t.factor.only_clean and t.at in having]
            if clean:
                self._warn_of_clean_gradients(clean)
        return found

    def finish_update(self) -> None:
        """Note that a step was made."""
        self.steps += 1
        self.forget_passes()
        self._radius_changed()

    @torch.no_grad()
    def finish_step(self) -> None:
        """Recompute, once the optimizer has stepped, what compiled forward passes cannot."""
        if self._bound is not None and self._claimed and not self.ended:
            self._bound.update()

    def forget_passes(self) -> None:
        """Mark all factors as not yet used by a pass."""
        for factor in self.factors:
            factor.ran_perturbed = factor.ran_clean = False

    def note(self, rows: Operands, norms: Tensor) -> None:
        """Store the norms of these pairs, for :attr:`norms`."""
        at = [row for row, index in enumerate(rows.indices) if index in rows.having]
        whole = len(at) == len(rows.indices)
        self._norms = ([rows.indices[row] for row in at], norms if whole else norms[at])
        if rows.missing is not None:  # they were counted as skipped: their gradients are zeros
            self._skipped -= rows.missing.to(self._skipped.device)

    def has_gradients(self) -> bool:
        """Return whether any pair with a scaling has a gradient."""
        return any(
            pair.scaling != 0
            and any(self._parameters[slot].grad is not None for slot in pair.slots.values())
            for pair in self.pairs
        )

    def saved_averages(self) -> list[Tensor]:
        """Return the averages to be saved, one for each factor; none where there is no memory."""
        return []

    @torch.no_grad()
    def load_averages(self, values: Sequence[Tensor | None]) -> None:
        """Load the averages of all factors; None for zeros."""
        for average, value in zip(self.saved_averages(), values, strict=True):
            # In place: passes may be compiled with these tensors.
            average.zero_() if value is None else average.copy_(laid_out_as(value, average))
        if self._bound is not None:
            self._bound.average_changed()
            self.finish_step()

    def load_counters(self, steps: int, skipped: int) -> None:
        """Load ``steps`` and ``skipped``."""
        self.steps = int(steps)
        self._skipped.fill_(int(skipped))
        self.forget_passes()
        self._radius_changed()

    def _radius_changed(self) -> None:
        """Show rho in the optimizer's groups, beside its other numbers."""
        claimant = None if self.ended else self._claimant()
        # A schedule may end with the last step. What it raises is the next step's to raise.
        with suppress(Exception):
            radius = self.settings.radius(self.steps)
            if self._bound is not None:
                self._bound.radius = radius
            shown = claimant.param_groups if claimant is not None and self._shows_radius else ()
            for group in shown:
                group[RHO] = radius

    def _warn_of_clean_gradients(self, names: list[str]) -> None:
        """Warn, once, of pairs whose gradients were taken without the perturbation."""
        self._warned = True
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"the gradient of {names[0]}{more} was taken without the perturbation: its layer "
            "did not run in training mode (model.train()) since the last step, or another "
            "library's kernel ran in its place",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
