"""Variants of EFlat-LoRA whose perturbation stays in the full space.

Equation (3) transfers the perturbation onto one factor, which keeps only a part of it. Here
training forward passes run at ``W0 + s B A + E`` with a low-rank product E = U V, at one gradient
per step. Each variant is AdamW with another E, of norm rho in each layer, or in all layers together
for ``norm_scope="global"``:

"eflat-full"      the mean of equation (1)
"eflat-tangent"   the projection of the gradient on the tangent space of the matrices of rank r,
                  G_B (A^T)^+ + (B^T)^+ (G_A - B^T G_B (A^T)^+), over s: exact for LoRA's gradients
"eflat-restored"  s E_B A of equation (3), averaged as in EFlat-LoRA and rescaled to radius rho
"sketch-K"        the K leading singular directions of the moving average of the true gradient. The
                  average is never formed: a layer's input X and output gradient D give its products
                  with thin matrices, G_W V = D^T (X V), and one round of subspace iteration a step,
                  started from the last step's V, follows its leading directions (as PowerSGD does,
                  Vogels et al., arXiv 1905.13727).

"lora-sam-ema" perturbs the factors as LoRA-SAM does, each along its own gradient, averaged over
steps as in EFlat-LoRA, so that it takes one gradient per step.

"full-sam" is the method that all of these approximate, at two gradients per step: SAM (Foret et
al., arXiv 2010.01412) on the weights W of the adapted layers, along their true gradient of the same
batch. Its result shows how much a better estimate of the gradient could gain.

The first two use the newest gradient only (beta 1), since an average would have a higher rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eflat_ext.lab.finetune.comparison import Builder, adamw_settings
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lora import LoraPair, find_pairs
from eflat_ext.ops import perturb
from eflat_ext.optim.factories import trainable_parameters
from eflat_ext.perturbation.base import Perturbation
from eflat_ext.perturbation.settings import Settings
from eflat_ext.reference import default_rtol


class Carrier:
    """Low-rank perturbation ``U V`` of one linear layer's weight, (n, k) and (k, m).

    Training forward passes of the layer are perturbed, evaluation is not.
    """

    def __init__(self, pair: LoraPair) -> None:
        self.pair = pair
        self.U: Tensor | None = None
        self.V: Tensor | None = None
        pair.layer.register_forward_hook(self._add)

    def update(self) -> None:
        """Compute U and V, of any norm, from the gradients of the factors."""
        raise NotImplementedError  # abstract

    def norm(self) -> float:
        """Return ``||U V||``."""
        assert self.U is not None and self.V is not None
        # Not from Gram matrices: where B is ill-conditioned, the columns of U nearly cancel.
        return float((torch.linalg.qr(self.U).R @ self.V).norm())

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.U is None or self.V is None or not layer.training:
            return output
        return output + (inputs[0] @ self.V.T) @ self.U.T


class FullCarrier(Carrier):
    """Perturbation along the estimate of the gradient from the factors' gradients.

    Args:
        tangent: take the projection on the tangent space instead of the mean of both terms.
    """

    def __init__(self, pair: LoraPair, beta: float, *, tangent: bool) -> None:
        super().__init__(pair)
        self._tangent = tangent

    def update(self) -> None:
        pair = self.pair
        grad_A, grad_B = pair.A.grad, pair.B.grad
        assert grad_A is not None and grad_B is not None
        rtol = default_rtol(pair.A, pair.B)
        pinv_At = torch.linalg.pinv(pair.A.double().T, rtol=rtol).to(pair.A)
        pinv_Bt = torch.linalg.pinv(pair.B.double().T, rtol=rtol).to(pair.A)
        if self._tangent:
            grad_B = grad_B - pinv_Bt @ (pair.B.T @ grad_B)
        self.U = torch.cat([grad_B, pinv_Bt], dim=1)
        self.V = torch.cat([pinv_At, grad_A])


class RestoredCarrier(Carrier):
    """Averaged transfer onto B, rescaled to the radius rho."""

    def __init__(self, pair: LoraPair, beta: float) -> None:
        super().__init__(pair)
        self._beta = beta
        self._average = torch.zeros_like(pair.B)

    def update(self) -> None:
        pair = self.pair
        assert pair.A.grad is not None and pair.B.grad is not None
        E, _ = perturb(pair.A, pair.B, pair.A.grad, pair.B.grad, pair.scaling, 1.0)
        self._average = self._average.lerp(E, self._beta)
        self.U, self.V = self._average, pair.A


class SketchCarrier(Carrier):
    """Perturbation along the leading singular directions of the weight's averaged gradient."""

    def __init__(self, pair: LoraPair, beta: float, *, rank: int) -> None:
        super().__init__(pair)
        self._beta = beta
        self._left: Tensor | None = None
        self._right = torch.randn(rank, pair.A.shape[1]).to(pair.A)  # average = left @ right

    def update(self) -> None:
        assert self._left is not None
        self.U, self.V = self._left, self._right

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = super()._add(layer, inputs, output)
        if layer.training and output.requires_grad:
            output.register_hook(functools.partial(self._fold_in, inputs[0].detach()))
        return output

    @torch.no_grad()
    def _fold_in(self, X: Tensor, D: Tensor) -> None:
        """Apply one round of subspace iteration to (1 - beta) left right + beta D^T X."""
        X, D = X.flatten(0, -2), D.flatten(0, -2)
        image = D.T @ (X @ self._right.T)
        if self._left is not None:
            old = self._left @ (self._right @ self._right.T)
            image = torch.lerp(old, image, self._beta)
        basis = torch.linalg.qr(image).Q
        right = (D @ basis).T @ X
        if self._left is not None:
            right = torch.lerp((basis.T @ self._left) @ self._right, right, self._beta)
        self._left, self._right = basis, right


class FullSpaceEFlat(torch.optim.AdamW):
    """AdamW with its gradient taken at perturbed weights.

    Args:
        model: a PEFT model whose adapters are on linear layers.
        carrier: creates the perturbation of a pair.
        rho: its norm.
        norm_scope: "layer" for each layer, "global" for all together.
        adamw: settings of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        carrier: Callable[[LoraPair], Carrier],
        *,
        rho: float,
        norm_scope: str,
        **adamw: Any,
    ) -> None:
        super().__init__(trainable_parameters(model), **adamw)
        self.carriers = [carrier(pair) for pair in find_pairs(model)]
        self._rho, self._scope = rho, norm_scope

    def step(self, closure: Callable[[], Any]) -> Any:
        """Take a step; the closure runs at perturbed weights."""
        loss = closure()
        self._perturb()
        super().step()
        return loss

    @torch.no_grad()
    def _perturb(self) -> None:
        """Apply the newest perturbations, scaled to rho."""
        for carrier in self.carriers:
            carrier.update()
        norms = [carrier.norm() for carrier in self.carriers]
        total = math.sqrt(sum(norm**2 for norm in norms))
        for carrier, norm in zip(self.carriers, norms, strict=True):
            size = total if self._scope == "global" else norm
            assert carrier.U is not None and carrier.V is not None
            # Copies, since AdamW changes the factors.
            carrier.U = carrier.U * (self._rho / size if size else 0.0)
            carrier.V = carrier.V.clone()


class TrueCarrier(Carrier):
    """Perturbation along the true gradient of the layer's weight, an (n, m) matrix."""

    def __init__(self, pair: LoraPair) -> None:
        super().__init__(pair)
        self._gradient = torch.zeros(pair.B.shape[0], pair.A.shape[1]).to(pair.A)

    def update(self) -> None:
        self.U, self.V = self._gradient, torch.eye(len(self.pair.A.T)).to(self._gradient)

    def clear(self) -> None:
        self.U = self.V = None

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.U is None and layer.training and output.requires_grad:
            output.register_hook(functools.partial(self._keep, inputs[0].detach()))
        return super()._add(layer, inputs, output)

    @torch.no_grad()
    def _keep(self, X: Tensor, D: Tensor) -> None:
        self._gradient = D.flatten(0, -2).T @ X.flatten(0, -2)


class FullSAM(FullSpaceEFlat):
    """SAM on the weights of the adapted layers: two gradients of each batch."""

    carriers: list[TrueCarrier]

    def step(self, closure: Callable[[], Any]) -> Any:
        """Take a step; the closure runs at the weights and at the worst point nearby."""
        loss = closure()
        self._perturb()
        try:
            closure()
        finally:
            for carrier in self.carriers:
                carrier.clear()
        torch.optim.AdamW.step(self)
        return loss


def _full_sam(config: FinetuneConfig, model: Any, steps: int) -> FullSAM:
    scope = config.norm_scope
    adamw = adamw_settings(config)
    return FullSAM(model, TrueCarrier, rho=config.rho, norm_scope=scope, **adamw)


class AveragedLoRASAM(torch.optim.AdamW):
    """AdamW with its gradient taken at factors perturbed by an average of LoRA-SAM's perturbation.

    Training forward passes are perturbed, evaluation is not.

    Args:
        model: a PEFT model.
        rho: norm of a pair's perturbation of both factors.
        beta: weight of the newest perturbation in the average.
        adamw: settings of AdamW.
    """

    def __init__(self, model: nn.Module, *, rho: float, beta: float, **adamw: Any) -> None:
        super().__init__(trainable_parameters(model), **adamw)
        self._rho, self._beta = rho, beta
        self._perturbation = Perturbation(model, Settings(rho=rho), ["A", "B"])
        self._perturbation.claim(self)
        self._pairs = [(p.parameter_A, p.parameter_B) for p in self._perturbation.pairs]
        self.averages = {f: torch.zeros_like(f) for pair in self._pairs for f in pair}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """Take a step; the closure runs at perturbed factors."""
        with torch.enable_grad():
            loss = closure()
        for pair in self._pairs:
            gradients = [factor.grad for factor in pair]
            norm = torch.stack([g.norm() for g in gradients]).norm()
            newest = [self._rho * g / norm if norm > 0 else 0 * g for g in gradients]
            torch._foreach_lerp_([self.averages[f] for f in pair], newest, self._beta)
        self._perturbation.put(self.averages)
        super().step()
        return loss


def _lora_sam_ema(config: FinetuneConfig, model: Any, steps: int) -> AveragedLoRASAM:
    return AveragedLoRASAM(model, rho=config.rho, beta=config.beta, **adamw_settings(config))


def _variant(carrier: Callable[..., Carrier], **options: Any) -> Builder:
    return functools.partial(_build, functools.partial(carrier, **options))


def _build(
    carrier: Callable[..., Carrier], config: FinetuneConfig, model: Any, steps: int
) -> FullSpaceEFlat:
    make = functools.partial(carrier, beta=config.beta)
    scope = config.norm_scope
    return FullSpaceEFlat(model, make, rho=config.rho, norm_scope=scope, **adamw_settings(config))


VARIANTS: dict[str, Builder] = {
    "eflat-full": _variant(FullCarrier, tangent=False),
    "eflat-tangent": _variant(FullCarrier, tangent=True),
    "eflat-restored": _variant(RestoredCarrier),
    "sketch-1": _variant(SketchCarrier, rank=1),
    "sketch-4": _variant(SketchCarrier, rank=4),
    "lora-sam-ema": _lora_sam_ema,
    "full-sam": _full_sam,
}
