"""The numbers of a perturbation, from the optimizer's constructor to the operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from eflat_ext.ops.checks import check_options

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
        rho = 0.0 if callable(self.rho) else _number(self.rho)
        rtol = None if self.rtol is None else _number(self.rtol)
        check_options(rho, self.onto, self.norm_scope, rtol)
        beta = _number(self.beta)
        if not isinstance(beta, float):
            raise TypeError(f"beta must be a number, got {type(beta).__name__}")
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], got {beta}")
        rho = self.rho if callable(self.rho) else rho
        for name, value in (("rho", rho), ("rtol", rtol), ("beta", beta)):
            object.__setattr__(self, name, value)

    def radius(self, steps: int) -> float:
        """Return rho for the step after ``steps`` completed ones.

        Raises:
            ValueError: a callable rho returns anything but a finite number >= 0.
        """
        if not callable(self.rho):
            return self.rho
        radius = _number(self.rho(steps))
        if not (isinstance(radius, float) and math.isfinite(radius) and radius >= 0):
            raise ValueError(
                f"rho must be a callable that returns a finite number >= 0, got {radius!r}"
            )
        return radius


def _number(value: Any) -> Any:
    """Return numbers of all libraries as floats, anything else as it is."""
    try:
        return value if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return value
