"""Flat-LoRA and LoRA-SAM: two gradients per step, the second at perturbed weights.

Flat-LoRA: Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3). LoRA-SAM, its peer,
perturbs the factors as SAM (Foret et al., arXiv 2010.01412) perturbs weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .additions import PartialAddition
from .dtensors import from_local
from .engines import initialises_state
from .gradient_watch import GradientWatch
from .optimizer_base import PairList, PerturbingOptimizer, Rho
from .pairs import LoraPair
from .sharded import Norms, Sharding
from .transferring import Transferring


class TwoGradients(PerturbingOptimizer):
    """A step of two gradients: the first makes the perturbation, the second moves the weights."""

    def _prepare(self, model: nn.Module) -> None:
        self._perturbation = PartialAddition()
        self._pending = False
        self._first_gradients: GradientWatch | None = None
        self._perturb_with(model, self._perturbation)
        self._weights.enabled = False

    def _perturbations(self, rho: float, rows: PairList) -> tuple[dict[int, Tensor], Tensor]:
        """What to add to targets, by their index, and the norms of the rows."""
        raise NotImplementedError  # abstract: what the two methods differ in

    def _perturbed_shards(
        self, rho: float, sharding: Sharding, indices: list[int]
    ) -> tuple[dict[int, Tensor], Norms]:
        """The same where factors are sharded: this rank's shards, and the norms of these pairs."""
        raise NotImplementedError  # abstract

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One whole step with a closure; without one, the same as :meth:`second_step`.

        The weights are clean afterwards, also when the closure or the base optimizer raises.

        Args:
            closure: zero_grad, forward, backward; evaluated twice, first at the clean weights.

        Returns:
            What the closure returned the first time, None without one.

        Raises:
            RuntimeError: no closure and no :meth:`first_step` before; or both.
        """
        loss = None
        if closure is None and not self._pending:
            if initialises_state(self.base):
                return self.base.step()
            raise RuntimeError(
                "step() needs a closure, or first_step() before it; with Hugging Face Trainer, "
                "eflat_ext.trainer.PerturbationMixin: class MyTrainer(PerturbationMixin, "
                "Trainer)"
            )
        if closure is not None:
            self._not_pending()
            with torch.enable_grad():
                loss = closure()
        # Restored within "try", too: a signal during the restoring in "finally" would end it.
        try:
            if closure is not None:
                self.first_step(zero_grad=False)
                with torch.enable_grad():
                    closure()
            unperturbed = self._weights.alive and not self._weights.visited
            self.abandon_step()
        finally:
            self.abandon_step()
        if unperturbed and self._has_gradients():
            self._warn_clean_gradient()
        self.base.step()
        self._steps += 1
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = True) -> None:
        """Perturb the weights along the gradients there are now.

        Scaled gradients need no unscaling: a common factor leaves the perturbation alone.

        Args:
            zero_grad: also drop these gradients, for the second ones to take their place.

        Raises:
            RuntimeError: the last :meth:`first_step` has had no :meth:`second_step`.
        """
        self._not_pending()
        deltas = self._new_perturbations(self._rho_now())
        self._perturbation.indices = list(deltas)
        self._perturbation.deltas = list(deltas.values())
        self._pending = self._weights.enabled = True
        self._weights.perturb()
        self._weights.visited = False
        if zero_grad:
            self.base.zero_grad()
        self._first_gradients = None if zero_grad else GradientWatch(self._weights.targets())
        self._weights.watch_gradients()

    def _new_perturbations(self, rho: float) -> dict[int, Tensor]:
        """What to add to targets, by their index; norms are kept, and counted."""
        sharding, indices = self._sharding() or (None, [])
        if sharding is None:
            rows = self._with_gradients()
            deltas, norms = self._perturbations(rho, rows)
            self._skipped_on(norms.device).add_((~(norms.isfinite() & (norms > 0))).sum())
            self._norms = (rows.indices, norms)
            return deltas
        if not indices:
            return {}
        shards, found = self._perturbed_shards(rho, sharding, indices)
        self._skipped_on(found.skipped.device).add_(found.skipped)
        self._keep_norms(indices, found.values)
        targets = self._weights.targets()
        return {index: from_local(shard, targets[index]) for index, shard in shards.items()}

    def second_step(self) -> None:
        """Restore the clean weights and step the base optimizer with the gradients there are now.

        Raises:
            RuntimeError: no :meth:`first_step` before.
        """
        if not self._pending:
            raise RuntimeError("second_step() needs first_step() before it")
        self.step()

    def abandon_step(self) -> None:
        """Restore the clean weights and forget a :meth:`first_step`; nothing if there was none."""
        self._weights.restore()
        self._weights.enabled = self._pending = False
        self._perturbation.indices, self._perturbation.deltas = [], []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients.

        Dropping the second gradients abandons the step: a gradient scaler that found an overflow
        in them never calls ``step``.
        """
        first = self._first_gradients
        if self._pending and self._has_gradients() and (first is None or first.replaced()):
            self.abandon_step()
        self._first_gradients = None
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.abandon_step()
        super().load_state_dict(state_dict)

    def _not_pending(self) -> None:
        if self._pending:
            raise RuntimeError(
                "the last first_step() has had no second_step(); after a step that was skipped, "
                "call optimizer.zero_grad() or optimizer.abandon_step()"
            )


class FlatLoRA(Transferring, TwoGradients):
    """Flat-LoRA: gradient, perturbation by equations (1)-(3), second gradient there, base step.

    Either ``step(closure)``, or :meth:`first_step` and :meth:`second_step` around the second
    gradient where a closure does not fit (gradient scaler, accumulation). In between, training
    forward passes of the model run at the perturbed weights; at any other time they are clean.
    A pair whose gradients are zero, or whose norm is not finite, stays unperturbed at that step
    and is counted in ``skipped_perturbations``.

    Args and errors: see :class:`EFlatLoRA`.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        *,
        rho: Rho = 0.05,
        onto: str = "B",
        norm_scope: str = "layer",
        rtol: float | None = None,
    ) -> None:
        super().__init__(model, base, rho=rho, onto=onto, norm_scope=norm_scope, rtol=rtol)
        self._prepare(model)

    def _perturbations(self, rho: float, rows: PairList) -> tuple[dict[int, Tensor], Tensor]:
        E, norms = torch.ops.eflat.foreach_perturb(
            rows.A,
            rows.B,
            rows.grad_A,
            rows.grad_B,
            rows.scaling,
            rho,
            self.onto,
            self.norm_scope,
            self.rtol,
        )
        targets = self._weights.targets()
        deltas: dict[int, Tensor] = {}
        for (pair, factor, index), e in zip(self._perturbed(rows.indices), E, strict=True):
            _put(deltas, index, pair, factor, targets[index], e)
        return deltas, norms

    def _perturbed_shards(
        self, rho: float, sharding: Sharding, indices: list[int]
    ) -> tuple[dict[int, Tensor], Norms]:
        perturbations, norms = sharding.perturb(
            [self.pairs[i] for i in indices],
            [self._target_of[i] for i in indices],
            rho,
            self.onto,
            self.norm_scope,
            self.rtol,
            lambda dtype: dtype,
        )
        return {index: value for index, (value, _) in perturbations.items()}, norms


def _put(
    deltas: dict[int, Tensor],
    index: int,
    pair: LoraPair,
    factor: str,
    target: Tensor,
    value: Tensor,
) -> None:
    """Make the perturbation of a pair, or its part of it, the one of the target of this index."""
    if pair.experts == 1:
        deltas[index] = value.view_as(target)
        return
    if index not in deltas:
        deltas[index] = torch.zeros_like(target, dtype=value.dtype)
    pair.part(factor, deltas[index]).copy_(value)


class LoRASAM(TwoGradients):
    """LoRA-SAM: as :class:`FlatLoRA`, but A and B are each perturbed along their own gradient.

    ``A + rho G_A / v`` and ``B + rho G_B / v``, v the norm of (G_A, G_B) together: of the pair, or
    of all pairs by ``norm_scope="global"``.
    """

    def __init__(
        self, model: nn.Module, base: Optimizer, *, rho: Rho = 0.05, norm_scope: str = "layer"
    ) -> None:
        super().__init__(model, base, rho=rho, norm_scope=norm_scope, factors=["A", "B"])
        self._prepare(model)

    def _perturbations(self, rho: float, rows: PairList) -> tuple[dict[int, Tensor], Tensor]:
        if not rows.indices:
            return {}, torch.zeros(0, device=self._skipped.device)
        norm_A, norm_B = (  # in float32 the squares of tiny gradients are zero
            torch.stack(torch._foreach_norm(list(grads), 2, torch.float64))
            for grads in (rows.grad_A, rows.grad_B)
        )
        norms = torch.hypot(norm_A, norm_B)
        good = norms.isfinite() & (norms > 0)
        scale = self._scales(rho, norms, good)
        targets = self._weights.targets()
        deltas: dict[int, Tensor] = {}
        for row, ok in enumerate(good.unbind()):
            i = rows.indices[row]
            for factor, index in self._target_of[i].items():
                grad = (rows.grad_A if factor == "A" else rows.grad_B)[row]
                delta = torch.where(ok, _times(grad, scale[row]), 0)
                _put(deltas, index, self.pairs[i], factor, targets[index], delta)
        return deltas, norms

    def _perturbed_shards(
        self, rho: float, sharding: Sharding, indices: list[int]
    ) -> tuple[dict[int, Tensor], Norms]:
        norms = sharding.gradient_norms([self.pairs[i] for i in indices])
        scale = self._scales(rho, norms.values, norms.usable)
        shards: dict[int, Tensor] = {}
        for factor in ("A", "B"):
            rows = [
                (self.pairs[i], self._target_of[i][factor], own)
                for i, own in zip(indices, scale.unbind(), strict=True)
                if factor in self._target_of[i]
            ]
            pairs, targets, scales = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
            spread = sharding.spread(pairs, targets, factor, scales)
            for pair, index, _ in rows:
                gradient, by = sharding.gradient(pair, factor), spread[index]
                shards[index] = torch.where(by != 0, _times(gradient, by), 0)
        return shards, norms

    def _scales(self, rho: float, norms: Tensor, good: Tensor) -> Tensor:
        """By what the gradients of each pair are multiplied."""
        norms = norms.double()
        shared = torch.where(good, norms, 0).norm() if self.norm_scope == "global" else norms
        return torch.where(good, rho / shared, 0)


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    """In float64: for a tiny gradient the scale is beyond float32's range."""
    return (gradient.double() * scale).to(gradient.dtype)
