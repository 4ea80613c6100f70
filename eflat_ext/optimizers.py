"""EFlat-LoRA, Flat-LoRA and LoRA-SAM as optimizers around any torch optimizer.

EFlat-LoRA and Flat-LoRA: Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3).
LoRA-SAM, their peer, perturbs the factors as SAM (Foret et al., arXiv 2010.01412) perturbs
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizer_base import PairList, PerturbingOptimizer, Rho
from .pairs import LoraPair

Method = TypeVar("Method", bound=PerturbingOptimizer)


class EFlatLoRA(PerturbingOptimizer):
    """EFlat-LoRA: one gradient per step, taken at weights perturbed by a moving average.

    Training forward passes of the model run at ``B + average`` (``A + average`` for ``onto="A"``,
    scaled down until its full-space norm is at most rho). ``step`` folds the perturbation of
    equations (1)-(3), computed from the gradients and the factors where they were taken, into the
    average, restores the clean weights and lets the base optimizer step. So weights are clean
    after ``step``; gradients accumulated over micro-batches belong to one perturbed point; and
    what saves or merges weights at any other time is given the clean ones. Averages are float32
    (float64 for float64 factors) and have the shape of their target.

    A pair whose gradients are zero, or whose norm is not finite, keeps its average bit for bit
    and is counted in ``skipped_perturbations``.

    Args:
        model: a PEFT model with LoRA on linear layers.
        base: the optimizer of its trainable parameters.
        rho: radius, in units of the weights: a finite number >= 0 or a callable of the number of
            completed steps. It may be assigned between steps; it is not in ``state_dict``.
        beta: weight of the newest perturbation in the average, in (0, 1].
        onto: the factor that carries the perturbation, "B" or "A".
        norm_scope: "layer" gives every pair the radius rho, "global" all pairs together.
        rtol: relative singular value below which a factor's direction counts as zero, in
            [1e-7, 1); None for the default of the operators.

    Raises:
        TypeError: ``base`` is no optimizer, or one that needs a closure (LBFGS).
        ValueError: an argument out of range, or nothing to perturb.
        RuntimeError: another optimizer perturbs this model already.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        *,
        rho: Rho = 0.05,
        beta: float = 0.9,
        onto: str = "B",
        norm_scope: str = "layer",
        rtol: float | None = None,
    ) -> None:
        _check_transfer(onto, rtol)
        if not 0 < beta <= 1:
            raise ValueError(f"beta: expected a number in (0, 1], got {beta!r}")
        super().__init__(model, base, rho=rho, norm_scope=norm_scope, factors=[onto])
        self.beta = float(beta)
        self.onto = onto
        self.rtol = rtol
        targets = [getattr(*slot) for slot in self._targets]
        averages = [torch.zeros_like(t, dtype=_average_dtype(t)) for t in targets]
        self._perturbation = (
            _BoundedAverages(averages, self.pairs, norm_scope) if onto == "A" else _Add(averages)
        )
        self._bound()
        self._perturb_with(model, self._perturbation)

    @property
    def averages(self) -> dict[str, Tensor]:
        """The moving average of each pair's perturbation, by pair name; live tensors."""
        return {
            pair.name: average for pair, average in zip(self.pairs, self._averages(), strict=True)
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the weights are clean afterwards, also when it raises.

        If the base optimizer raises, the averages have taken this step's perturbation already.

        Args:
            closure: evaluated once, at the perturbed weights: zero_grad, forward, backward.

        Returns:
            What the closure returned, None without one.
        """
        loss = None
        try:
            if closure is not None:
                self.train()
                with torch.enable_grad():
                    loss = closure()
            self._fold_in()
        finally:
            self._weights.restore()
        self._weights.visited = False
        self.base.step()
        self._steps += 1
        self._bound()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._bound()

    def _fold_in(self) -> None:
        rho = self._rho_now()
        rows = self._with_gradients()
        if self._weights.visited:
            # The gradients' own point, if an evaluation restored the weights since.
            self._weights.perturb()
        elif self._steps and rows.indices:
            self._warn_clean_gradient()
        averages = self._averages()
        norms = torch.ops.eflat.foreach_perturb_ema_(
            rows.A,
            rows.B,
            rows.grad_A,
            rows.grad_B,
            [averages[i] for i in rows.indices],
            self._skipped_on(rows.A[0].device if rows.A else self._skipped.device),
            rows.scaling,
            rho,
            self.beta,
            self.onto,
            self.norm_scope,
            self.rtol,
        )
        self._norms = (rows.indices, norms)

    def _averages(self) -> list[Tensor]:
        targets = [getattr(*slot) for slot in self._targets]
        return self._perturbation.on_devices_of(targets)

    def _bound(self) -> None:
        if isinstance(self._perturbation, _BoundedAverages):
            self._perturbation.rho = self._rho_now()


class _TwoGradients(PerturbingOptimizer):
    """A step of two gradients: the first makes the perturbation, the second moves the weights."""

    def _prepare(self, model: nn.Module) -> None:
        self._perturbation = _Add([])
        self._pending = False
        self._first_gradients = False
        self._perturb_with(model, self._perturbation)
        self._weights.enabled = False

    def _perturbations(self, rho: float, rows: PairList) -> tuple[list[int], list[Tensor], Tensor]:
        """Indices of targets, what to add to them, and the norms of the rows."""
        raise NotImplementedError

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
        if closure is None:
            if not self._pending:
                raise RuntimeError("step() needs a closure, or first_step() before it")
        else:
            self._not_pending()
            self._weights.restore()
            with torch.enable_grad():
                loss = closure()
            self.first_step(zero_grad=False)
            try:
                with torch.enable_grad():
                    closure()
            except BaseException:
                self.abandon_step()
                raise
        unperturbed = not self._weights.visited
        self.abandon_step()
        if unperturbed:
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
        self._weights.restore()
        rho = self._rho_now()
        rows = self._with_gradients()
        indices, deltas, norms = self._perturbations(rho, rows)
        skipped = self._skipped_on(norms.device)
        skipped += (~(norms.isfinite() & (norms > 0))).sum()
        self._norms = (rows.indices, norms)
        self._perturbation.indices, self._perturbation.deltas = indices, deltas
        self._pending = self._weights.enabled = True
        self._first_gradients = not zero_grad
        self._weights.perturb()
        self._weights.visited = True
        if zero_grad:
            self.base.zero_grad()

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
        if self._pending and not self._first_gradients and self._with_gradients().indices:
            self.abandon_step()
        self._first_gradients = False
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


class FlatLoRA(_TwoGradients):
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
        _check_transfer(onto, rtol)
        super().__init__(model, base, rho=rho, norm_scope=norm_scope, factors=[onto])
        self.onto = onto
        self.rtol = rtol
        self._prepare(model)

    def _perturbations(self, rho: float, rows: PairList) -> tuple[list[int], list[Tensor], Tensor]:
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
        return rows.indices, E, norms


class LoRASAM(_TwoGradients):
    """LoRA-SAM: as :class:`FlatLoRA`, but A and B are each perturbed along their own gradient.

    ``A + rho G_A / v`` and ``B + rho G_B / v``, v the norm of (G_A, G_B) together: of the pair, or
    of all pairs by ``norm_scope="global"``.
    """

    def __init__(
        self, model: nn.Module, base: Optimizer, *, rho: Rho = 0.05, norm_scope: str = "layer"
    ) -> None:
        super().__init__(model, base, rho=rho, norm_scope=norm_scope, factors=["A", "B"])
        self._prepare(model)

    def _perturbations(self, rho: float, rows: PairList) -> tuple[list[int], list[Tensor], Tensor]:
        if not rows.indices:
            return [], [], torch.zeros(0, device=self._skipped.device)
        double = all(grad.dtype == torch.float64 for grad in rows.grad_A + rows.grad_B)
        dtype = torch.float64 if double else torch.float32
        norm_A, norm_B = (
            torch.stack(torch._foreach_norm(list(grads), 2, dtype))
            for grads in (rows.grad_A, rows.grad_B)
        )
        norms = torch.hypot(norm_A, norm_B)
        good = norms.isfinite() & (norms > 0)
        shared = torch.where(good, norms, 0).norm() if self.norm_scope == "global" else norms
        scale = torch.where(good, rho / shared, 0)
        index_of = {id(getattr(*slot)): index for index, slot in enumerate(self._targets)}
        indices, deltas = [], []
        for row, ok in enumerate(good.unbind()):
            for factor, grad in ((rows.A[row], rows.grad_A[row]), (rows.B[row], rows.grad_B[row])):
                index = index_of.pop(id(factor), None)  # frozen factors are no targets
                if index is not None:
                    indices.append(index)
                    deltas.append(torch.where(ok, grad * scale[row], 0).to(grad.dtype))
        return indices, deltas, norms


class _Add:
    """Adds one tensor to each target, or to those of some indices."""

    def __init__(self, deltas: list[Tensor]) -> None:
        self.deltas = deltas
        self.indices: list[int] | None = None

    def __call__(self, targets: list[Tensor]) -> None:
        if self.indices is not None:
            targets = [targets[index] for index in self.indices]
        if targets:
            torch._foreach_add_(targets, self.on_devices_of(targets))

    def on_devices_of(self, targets: Sequence[Tensor]) -> list[Tensor]:
        for index, (delta, target) in enumerate(zip(self.deltas, targets, strict=True)):
            if delta.device != target.device:  # the model has moved
                self.deltas[index] = delta.to(target.device)
        return self.deltas


class _BoundedAverages(_Add):
    """Adds averages onto A, scaled down until ``||s B average|| <= rho``.

    They were made with an earlier B: while B is small and grows, the product would explode.
    """

    def __init__(self, averages: list[Tensor], pairs: list[LoraPair], norm_scope: str) -> None:
        super().__init__(averages)
        self.rho = 0.0
        self._pairs = pairs
        self._norm_scope = norm_scope

    def __call__(self, targets: list[Tensor]) -> None:
        torch.ops.eflat.foreach_add_bounded_(
            targets,
            self.on_devices_of(targets),
            [pair.B for pair in self._pairs],
            [pair.scaling for pair in self._pairs],
            self.rho,
            self._norm_scope,
        )


def create_eflat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    rho: Rho = 0.05,
    beta: float = 0.9,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
    params: Any = None,
    **optimizer_kwargs: Any,
) -> EFlatLoRA:
    """An :class:`EFlatLoRA` over a new base optimizer of all trainable parameters of the model.

    Args:
        model, rho, beta, onto, norm_scope, rtol: see :class:`EFlatLoRA`.
        optimizer_cls: class of the base optimizer.
        params: parameters, named parameters or groups for it, in place of all trainable ones.
        **optimizer_kwargs: passed on to it (``lr`` and so on).
    """
    base = optimizer_cls(_trainable(model, params), **optimizer_kwargs)
    return EFlatLoRA(
        model, base, rho=rho, beta=beta, onto=onto, norm_scope=norm_scope, rtol=rtol
    )


def create_flat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    rho: Rho = 0.05,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
    params: Any = None,
    **optimizer_kwargs: Any,
) -> FlatLoRA:
    """A :class:`FlatLoRA` over a new base optimizer; see :func:`create_eflat_optimizer`."""
    base = optimizer_cls(_trainable(model, params), **optimizer_kwargs)
    return FlatLoRA(model, base, rho=rho, onto=onto, norm_scope=norm_scope, rtol=rtol)


def create_lora_sam_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    rho: Rho = 0.05,
    norm_scope: str = "layer",
    params: Any = None,
    **optimizer_kwargs: Any,
) -> LoRASAM:
    """A :class:`LoRASAM` over a new base optimizer; see :func:`create_eflat_optimizer`."""
    base = optimizer_cls(_trainable(model, params), **optimizer_kwargs)
    return LoRASAM(model, base, rho=rho, norm_scope=norm_scope)


def _trainable(model: nn.Module, params: Any) -> Any:
    if params is not None:
        return params
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _average_dtype(target: Tensor) -> torch.dtype:
    return torch.float64 if target.dtype == torch.float64 else torch.float32


def _check_transfer(onto: str, rtol: float | None) -> None:
    if onto not in ("A", "B"):
        raise ValueError(f'onto: expected "A" or "B", got {onto!r}')
    if rtol is not None and not 1e-7 <= rtol < 1:
        raise ValueError(f"rtol: expected None or a number in [1e-7, 1), got {rtol!r}")
