"""What the methods share that carry a full-space perturbation over to one factor."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from .optimizer_arguments import check_operable, check_transfer
from .optimizer_base import PerturbingOptimizer, Rho


class Transferring(PerturbingOptimizer):
    """Perturbs the factor ``onto`` alone, by the operators."""

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        *,
        rho: Rho,
        onto: str,
        norm_scope: str,
        rtol: float | None,
    ) -> None:
        check_transfer(onto, rtol)
        super().__init__(model, base, rho=rho, norm_scope=norm_scope, factors=[onto])
        check_operable(self.pairs)
        self._onto, self._rtol = onto, rtol

    @property
    def onto(self) -> str:
        """The factor that carries the perturbation, "B" or "A"."""
        return self._onto

    @property
    def rtol(self) -> float | None:
        """Relative cut-off of a factor's singular values; None for the operators' default."""
        return self._rtol
