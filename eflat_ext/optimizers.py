"""EFlat-LoRA as an optimizer around any torch optimizer, and the factories of all three methods.

EFlat-LoRA: Deng et al., "EFlat-LoRA", arXiv 2508.00522, equations (1)-(3).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .additions import Addition, BoundedAverages
from .dtensors import is_dtensor, local
from .engines import initialises_state
from .fused_step import adamw_lists, without_gradients
from .optimizer_arguments import make_base, number
from .optimizer_base import Rho
from .sharded import Sharding
from .transferring import Transferring
from .two_gradients import FlatLoRA, LoRASAM

__all__ = [
    "EFlatLoRA",
    "FlatLoRA",
    "LoRASAM",
    "create_eflat_optimizer",
    "create_flat_optimizer",
    "create_lora_sam_optimizer",
]


class EFlatLoRA(Transferring):
    """EFlat-LoRA: one gradient per step, taken at weights perturbed by a moving average.

    Training forward passes of the model run at ``B + average`` (``A + average`` for ``onto="A"``,
    scaled down until its full-space norm is at most rho; both for ``onto="both"``). ``step`` folds
    the perturbation of equations (1)-(3), computed from the gradients and the factors where they
    were taken, into the average, restores the clean weights and lets the base optimizer step. So
    weights are clean after ``step``; gradients accumulated over micro-batches belong to one
    perturbed point; and what saves or merges weights at any other time is given the clean ones.
    Averages are float32 (float64 for float64 factors) and have the shape of their target. Each
    expert of a layer counts as a layer of its own.

    A pair whose gradients are zero, or whose norm is not finite, keeps its average bit for bit
    and is counted in ``skipped_perturbations``.

    Args:
        model: a PEFT model with LoRA layers.
        base: the optimizer of its trainable parameters.
        rho: radius, in units of the weights: a finite number >= 0 or a callable of the number of
            completed steps. It may be assigned between steps; it is not in ``state_dict``.
        beta: weight of the newest perturbation in the average, in (0, 1].
        onto: the factor that carries the perturbation, "B" or "A", or "both", which is not the
            paper's: see :func:`eflat_ext.ops.foreach_perturb`. Pairs of which one factor is frozen
            or tied to another's train without a perturbation then.
        norm_scope: "layer" gives every pair the radius rho, "global" all pairs together.
        rtol: relative singular value below which a factor's direction counts as zero, in
            [1e-7, 1); None for the default of the operators.
        fused_step: use the fused operator where it applies: around a plain
            ``torch.optim.AdamW``, one operator does the whole step of all pairs, in float32 for
            factors of up to 32 bits. May be assigned between steps.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: ``model`` is no module; ``base`` is no optimizer, one of this package, one that
            needs a closure (LBFGS) or moves weights outside ``step`` (schedule-free ones); factors
            A and B of a pair have different dtypes.
        ValueError: an argument out of range; ``base`` maximises; nothing to perturb; LoRA factors
            on several devices, or of a rank above 256.
        NotImplementedError: the model is sharded by the older FSDP, or its factors in another
            layout than ``eflat_ext.sharded.SUPPORTED``.
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
        fused_step: bool = True,
    ) -> None:
        if not 0 < number(beta) <= 1:
            raise ValueError(f"beta: expected a number in (0, 1], got {beta!r}")
        super().__init__(model, base, rho=rho, onto=onto, norm_scope=norm_scope, rtol=rtol)
        self._beta = float(beta)
        self.fused_step = fused_step
        targets = [getattr(*slot) for slot in self._targets]
        averages = [
            torch.zeros_like(t, dtype=average_dtype(t.dtype), memory_format=torch.contiguous_format)
            for t in targets
        ]
        self._perturbation = (
            BoundedAverages(averages, self.pairs, self._target_of, norm_scope)
            if "A" in self._factors
            else Addition(averages, self.pairs, self._target_of)
        )
        self._rho_changed()
        self._perturb_with(model, self._perturbation)

    @property
    def beta(self) -> float:
        """Weight of the newest perturbation in the average."""
        return self._beta

    @property
    def averages(self) -> dict[str, Tensor]:
        """The moving average of each pair's perturbation, by pair name; live tensors.

        Onto both, the names end in ".A" and ".B". Where factors are sharded these are DTensors laid
        out as their targets; of experts, gathered copies, so that all ranks have to ask.
        """
        averages = self._averages()
        found = {}
        for pair, factor, index in self._perturbed(range(len(self.pairs))):
            average: Any = averages[index]
            if pair.experts > 1 and is_dtensor(average):
                average = average.full_tensor()
            name = f"{pair.name}.{factor}" if self.onto == "both" else pair.name
            found[name] = pair.part(factor, average)
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; the weights are clean afterwards, also when it raises.

        If the base optimizer raises, the averages have taken this step's perturbation already, and
        the pairs their step where the fused operator applies.

        Args:
            closure: evaluated once, at the perturbed weights: zero_grad, forward, backward.

        Returns:
            What the closure returned, None without one.
        """
        if closure is None and initialises_state(self.base):
            self._weights.restore()
            return self.base.step()
        loss = None
        stepped: list[Tensor] = []
        try:
            if closure is not None:
                if not self._weights.alive:
                    self.train()
                with torch.enable_grad():
                    loss = closure()
            stepped = self._fold_in()
            # Here, too: a signal during the restoring in "finally" would end it.
            self._weights.restore()
        finally:
            self._weights.restore()
        self._weights.visited = False
        with without_gradients(stepped):
            self.base.step()
        self._steps += 1
        self._rho_changed()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._rho_changed()

    def _fold_in(self) -> list[Tensor]:
        """Put this step's perturbations into the averages; returns what was stepped with them."""
        rho = self._rho_now()
        sharding = self._sharding()
        if self._weights.visited:
            # The gradients' own point, if an evaluation restored the weights since.
            self._weights.perturb()
        elif self._steps and self._has_gradients():
            self._warn_clean_gradient()
        if sharding is not None:
            self._fold_in_shards(*sharding, rho)
            return []
        rows = self._with_gradients()
        parts = self._parts(rows.indices, self._averages())
        averages = [part.flatten(1).contiguous() for part in parts]
        skipped = self._skipped_on(rows.A[0].device if rows.A else self._skipped.device)
        gradients = (rows.A, rows.B, rows.grad_A, rows.grad_B)
        radius = (rows.scaling, rho, self.beta)
        options = (self.onto, self.norm_scope, self.rtol)
        adamw = adamw_lists(self.base, rows) if self.fused_step else None
        if adamw is None:
            norms = torch.ops.eflat.foreach_perturb_ema_(
                *gradients, averages, skipped, *radius, *options
            )
        else:
            moments, numbers = adamw[:3], adamw[3:]
            stepped = [target for _, _, target in self._perturbed(rows.indices)]
            with self._weights.restored_by(stepped) as clean:
                clean = [value.flatten(1) for value in clean]
                norms = torch.ops.eflat.foreach_adamw_step_(
                    *gradients, clean, averages, *moments, skipped, *radius, *numbers, *options
                )
        for part, average in zip(parts, averages, strict=True):
            if not part.is_contiguous():
                part.copy_(average)
        self._norms = (rows.indices, norms)
        return [] if adamw is None else [*rows.parameters_A, *rows.parameters_B]

    def _fold_in_shards(self, sharding: Sharding, indices: list[int], rho: float) -> None:
        averages = self._averages()
        if not indices:
            return
        perturbations, norms = sharding.perturb(
            [self.pairs[i] for i in indices],
            [self._target_of[i] for i in indices],
            rho,
            self.onto,
            self.norm_scope,
            self.rtol,
            average_dtype,
        )
        for target, (value, usable) in perturbations.items():
            average = local(averages[target])
            average.copy_(average.lerp(value, self.beta).where(usable, average))
        self._skipped_on(norms.skipped.device).add_(norms.skipped)
        self._keep_norms(indices, norms.values)

    def _averages(self) -> list[Tensor]:
        targets = self._weights.targets()
        averages = self._perturbation.on_devices_of(targets)
        for index, (average, target) in enumerate(zip(averages, targets, strict=True)):
            averages[index] = average.to(average_dtype(target.dtype))  # a model may change its type
        return averages

    def _rho_changed(self) -> None:
        # A schedule may end with the last step. What it raises is the next step's to raise, which
        # asks again before anything moves.
        if isinstance(self._perturbation, BoundedAverages):
            with suppress(Exception):
                self._perturbation.rho.fill_(self._rho_now())


def create_eflat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    rho: Rho = 0.05,
    beta: float = 0.9,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
    fused_step: bool = True,
    params: Any = None,
    **optimizer_kwargs: Any,
) -> EFlatLoRA:
    """An :class:`EFlatLoRA` over a new base optimizer of all trainable parameters of the model.

    Args:
        model, rho, beta, onto, norm_scope, rtol, fused_step: see :class:`EFlatLoRA`.
        optimizer_cls: class of the base optimizer.
        params: parameters, named parameters or groups for it, in place of all trainable ones.
        **optimizer_kwargs: passed on to it (``lr`` and so on).

    Raises:
        TypeError: ``optimizer_cls`` is an optimizer, no class of them; or as :class:`EFlatLoRA`.
        ValueError: the model trains nothing; or as :class:`EFlatLoRA`.
        ImportError, NotImplementedError, RuntimeError: as :class:`EFlatLoRA`.
    """
    base = make_base(model, optimizer_cls, params, optimizer_kwargs)
    return EFlatLoRA(
        model,
        base,
        rho=rho,
        beta=beta,
        onto=onto,
        norm_scope=norm_scope,
        rtol=rtol,
        fused_step=fused_step,
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
    base = make_base(model, optimizer_cls, params, optimizer_kwargs)
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
    base = make_base(model, optimizer_cls, params, optimizer_kwargs)
    return LoRASAM(model, base, rho=rho, norm_scope=norm_scope)


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the averages for factors of a type."""
    return torch.float64 if dtype == torch.float64 else torch.float32
