"""The numbers of a perturbation, from the optimizer's constructor to the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from eflat_ext.ops.checks import check_beta, check_norm_scope, check_onto, check_rho, check_rtol

RHO = "perturbation_rho"  # the name of the coming step's radius in an optimizer's groups
Rho: TypeAlias = float | Callable[[int], float]


@dataclass(frozen=True)
class Settings:
    """Settings of a perturbation, checked when they are made.

    Attributes:
        rho: radius, in units of the weights: a finite number >= 0, or a callable of the number of
            completed steps.
        onto: the factor that carries the perturbation, "B" or "A", or "both".
        norm_scope: "layer" gives every pair the radius rho, "global" all pairs together.
        rtol: relative singular value below which a factor's direction counts as zero, in
            [1e-7, 1); None for the default of the operators.
        beta: weight of the newest perturbation in the moving average, in (0, 1].

    Raises:
        TypeError: one of them is of the wrong type.
        ValueError: one of them is out of range.
    """

    rho: Rho = 0.05
    onto: str = "B"
    norm_scope: str = "layer"
    rtol: float | None = None
    beta: float = 0.9

    def __post_init__(self) -> None:
        rho = self.rho if callable(self.rho) else check_rho(self.rho)
        check_onto(self.onto)
        check_norm_scope(self.norm_scope)
        check_rtol(self.rtol)
        check_beta(self.beta, positive=True)
        rtol = None if self.rtol is None else float(self.rtol)
        for name, value in (("rho", rho), ("rtol", rtol), ("beta", float(self.beta))):
            object.__setattr__(self, name, value)

    def radius(self, steps: int) -> float:
        """Return rho for the step after ``steps`` completed ones.

        Raises:
            TypeError, ValueError: a callable rho returns anything but a finite number >= 0.
        """
        return check_rho(self.rho(steps)) if callable(self.rho) else self.rho
