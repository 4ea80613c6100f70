"""What the methods share that carry a full-space perturbation over to the factors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from .arguments import perturbed
from .optimizer_arguments import check_operable, check_transfer
from .optimizer_base import PerturbingOptimizer, Rho
from .pairs import LoraPair


class Transferring(PerturbingOptimizer):
    """Perturbs the factor ``onto`` alone, or both, by the operators."""

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
        self._factors = perturbed(onto, ["A"], ["B"])
        super().__init__(
            model,
            base,
            rho=rho,
            norm_scope=norm_scope,
            factors=self._factors,
            together=onto == "both",
        )
        check_operable(self.pairs)
        self._onto, self._rtol = onto, rtol

    @property
    def onto(self) -> str:
        """The factor that carries the perturbation, "B" or "A", or "both"."""
        return self._onto

    @property
    def rtol(self) -> float | None:
        """Relative cut-off of a factor's singular values; None for the operators' default."""
        return self._rtol

    def _perturbed(self, indices: Iterable[int]) -> list[tuple[LoraPair, str, int]]:
        """What the operators list of some pairs: pair, factor, and the index of its target."""
        indices = list(indices)
        return [
            (self.pairs[i], factor, self._target_of[i][factor])
            for factor in self._factors
            for i in indices
        ]

    def _parts(self, indices: Iterable[int], tensors: list[Tensor]) -> list[Tensor]:
        """What these own of tensors shaped like the targets; views."""
        return [pair.part(f, tensors[target]) for pair, f, target in self._perturbed(indices)]
