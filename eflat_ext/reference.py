"""The paper's equations and training loops as written: slow, float64, everything materialised.

Deng et al., "EFlat-LoRA" (arXiv 2508.00522), with ``W = W0 + s B A``:

    (1)  G_hat = (1/2s) [ G_B (A^T)^+ + (B^T)^+ G_A ]      full-space gradient      (n, m)
    (2)  E_W   = rho G_hat / ||G_hat||                     full-space perturbation  (n, m)
    (3)  E_B   = (1/s) E_W A^+                             transfer onto B          (n, r)
         E_A   = (1/s) B^+ E_W                             transfer onto A          (r, m)

``onto="both"`` is not the paper's: to first order, the perturbation of both factors is rho times
the direction of the gradient's projection on the tangent space of the matrices of rank r.

The tests of operators and optimizers compare with this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def perturbed_factors(onto: str, A: Sequence[T], B: Sequence[T]) -> list[T]:
    """Return the entries for the perturbed factors: those of all A, then those of all B."""
    return [*(A if onto != "B" else ()), *(B if onto != "A" else ())]


def default_rtol(A: Tensor, B: Tensor) -> float:
    """Return the relative singular value below which a factor's direction counts as zero.

    Args:
        A: (r, m) factor. B: (n, r) factor.

    Returns:
        ``min(max(n, m, r) eps32, 1e-3)`` for types of up to 32 bits,
        ``max(1e-7, max(n, m, r) eps64)`` for float64.
    """
    # Again in csrc/bindings/arguments.h; python_tests/ops/test_default_rtol.py compares them.
    size = max(B.shape[0], A.shape[1], A.shape[0])
    if A.dtype == torch.float64:
        return max(1e-7, size * torch.finfo(torch.float64).eps)
    return min(size * torch.finfo(torch.float32).eps, 1e-3)


def full_space_gradient(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float, rtol: float | None = None
) -> Tensor:
    """Return the (n, m) float64 estimate of the gradient of W, equation (1).

    Args:
        A: (r, m). B: (n, r). grad_A, grad_B: their gradients, of the same shapes. Any float dtype.
        scaling: the layer's ``s``, not zero.
        rtol: cutoff of the pseudo-inverses, :func:`default_rtol` if None.
    """
    rtol = default_rtol(A, B) if rtol is None else rtol
    A, B, grad_A, grad_B = (t.double() for t in (A, B, grad_A, grad_B))
    pinv_At = torch.linalg.pinv(A.T, rtol=rtol)
    pinv_Bt = torch.linalg.pinv(B.T, rtol=rtol)
    return (grad_B @ pinv_At + pinv_Bt @ grad_A) / (2 * scaling)


def transfer(
    E_W: Tensor, A: Tensor, B: Tensor, scaling: float, onto: str = "B", rtol: float | None = None
) -> Tensor:
    """Transfer an (n, m) perturbation of W onto one factor, equation (3), in float64.

    Returns:
        E_B of shape (n, r) for ``onto="B"``, E_A of shape (r, m) for ``onto="A"``.
    """
    rtol = default_rtol(A, B) if rtol is None else rtol
    if onto == "B":
        return E_W @ torch.linalg.pinv(A.double(), rtol=rtol) / scaling
    return torch.linalg.pinv(B.double(), rtol=rtol) @ E_W / scaling


def tangent(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float,
    rho: float,
    rtol: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(E_A, E_B, norm)`` in float64, with ``s (E_B A + B E_A) = rho P / ||P||``.

    ``P = (1/s) [ (1 - B B^+) G_B (A^T)^+ + (B^T)^+ G_A ]`` is the projection of the gradient of W
    on the tangent space at ``B A``, exact for LoRA's gradients, and ``norm`` its norm. Since both
    factors move, W also moves by ``s E_B E_A``. Where that is more than half of rho, as while B is
    small, B alone is perturbed, along ``P = (1/s) G_B (A^T)^+``.
    """
    rtol = default_rtol(A, B) if rtol is None else rtol
    A, B, grad_A, grad_B = (t.double() for t in (A, B, grad_A, grad_B))
    pinv_A, pinv_B = torch.linalg.pinv(A, rtol=rtol), torch.linalg.pinv(B, rtol=rtol)
    pinv_At = pinv_A.T
    columns, values, _ = torch.linalg.svd(B, full_matrices=False)
    columns = columns[:, values > rtol * values[0]]  # an orthonormal basis
    beside = grad_B - columns @ (columns.T @ grad_B)
    if columns.shape[0] == columns.shape[1]:
        beside = torch.zeros_like(beside)  # and no rounding
    of_B = beside @ pinv_At
    of_A = pinv_B.T @ grad_A
    P = (of_B + of_A) / scaling
    E_B, E_A = of_B @ pinv_A, pinv_B @ of_A
    size = P.norm() * scaling * scaling / rho if rho else P.new_tensor(math.inf)
    if (scaling * (E_B / size) @ (E_A / size)).norm() > rho / 2:
        P = grad_B @ pinv_At / scaling
        E_B, E_A = grad_B @ pinv_At @ pinv_A, torch.zeros_like(A)
        size = P.norm() * scaling * scaling / rho
    return E_A / size, E_B / size, P.norm()


def perturb(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float,
    rho: float,
    onto: str = "B",
    rtol: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(E, norm of G_hat)`` of one pair by equations (1)-(3), in float64.

    E is zero where the norm is zero or not finite (the pseudo-inverse of a factor that is not
    finite does not exist: the norm is NaN then).
    """
    if onto not in ("B", "A"):
        raise ValueError(f"onto must be 'B' or 'A', got {onto!r}")
    E, norms = foreach_perturb([A], [B], [grad_A], [grad_B], [scaling], rho, onto, "layer", rtol)
    return E[0], norms[0]


def foreach_perturb(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    scaling: Sequence[float],
    rho: float,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Return ``(list of E, norms per layer)`` by equations (1)-(3), in float64.

    ``norm_scope="global"`` divides by the root of the sum of squares over the layers whose own
    norm is finite; a layer whose norm is zero or not finite gets E = 0. For ``onto="both"``
    the list holds E_A of all pairs, then E_B of all pairs.
    """
    pairs = list(zip(A, B, grad_A, grad_B, scaling, strict=True))
    if onto == "both":
        return _foreach_tangent(pairs, rho, norm_scope, rtol)
    gradients = [
        full_space_gradient(*pair, rtol)
        if all(bool(t.isfinite().all()) for t in pair[:4])
        else torch.full((pair[1].shape[0], pair[0].shape[1]), math.nan, dtype=torch.float64)
        for pair in pairs
    ]
    norms = [float(G.detach().norm()) for G in gradients]
    total = math.sqrt(sum(norm**2 for norm in norms if math.isfinite(norm)))
    E = []
    for (a, b, _, _, s), G, norm in zip(pairs, gradients, norms, strict=True):
        if norm > 0 and math.isfinite(norm):
            E_W = rho * G / (norm if norm_scope == "layer" else total)
            E.append(transfer(E_W, a, b, s, onto, rtol))
        else:
            E.append(torch.zeros_like(b if onto == "B" else a, dtype=torch.float64))
    return E, torch.tensor(norms, dtype=torch.float64)


def _foreach_tangent(
    pairs: list[tuple[Tensor, Tensor, Tensor, Tensor, float]],
    rho: float,
    norm_scope: str,
    rtol: float | None,
) -> tuple[list[Tensor], Tensor]:
    E_A, E_B, norms = [], [], []
    for pair in pairs:
        A, B = pair[0].double(), pair[1].double()
        norm = math.nan
        if all(bool(t.isfinite().all()) for t in pair[:4]):
            A, B, size = tangent(*pair, rho, rtol)
            norm = float(size.detach())
        good = norm > 0 and math.isfinite(norm)
        E_A.append(A if good else torch.zeros_like(A))
        E_B.append(B if good else torch.zeros_like(B))
        norms.append(norm)
    if norm_scope == "global":
        total = math.sqrt(sum(norm**2 for norm in norms if math.isfinite(norm)))
        shares = [norm / total if total and math.isfinite(norm) else 0.0 for norm in norms]
        E_A, E_B = ([e * x for e, x in zip(E, shares, strict=True)] for E in (E_A, E_B))
    return [*E_A, *E_B], torch.tensor(norms, dtype=torch.float64)


# The training loops.  `pairs` are (A, B, scaling); `closure` does zero_grad, forward, backward and
# returns the loss; `base` is any torch optimizer over the factors (and anything else).

Pairs = Sequence[tuple[Tensor, Tensor, float]]
Closure = Callable[[], Tensor]


def _gradient(factor: Tensor) -> Tensor:
    return torch.zeros_like(factor) if factor.grad is None else factor.grad


def _targets(pairs: Pairs, onto: str) -> list[Tensor]:
    A, B, _ = zip(*pairs, strict=True)
    return perturbed_factors(onto, A, B)


def _perturbations(
    pairs: Pairs, rho: float, onto: str, norm_scope: str, rtol: float | None
) -> list[Tensor]:
    A, B, scaling = zip(*pairs, strict=True)
    grad_A, grad_B = [_gradient(a) for a in A], [_gradient(b) for b in B]
    return foreach_perturb(A, B, grad_A, grad_B, scaling, rho, onto, norm_scope, rtol)[0]


def bounded(pairs: Pairs, ema: Sequence[Tensor], rho: float, norm_scope: str) -> list[Tensor]:
    """Return averages onto A, made with an earlier B, scaled down to ``||s B E_A|| <= rho``.

    ``norm_scope="global"`` scales all of them by one factor, so that the root of the sum of
    squares is at most rho.
    """
    norms = [
        float((s * b.detach().double() @ E.double()).norm())
        for (_, b, s), E in zip(pairs, ema, strict=True)
    ]
    if norm_scope == "global":
        norms = [math.hypot(*norms)] * len(norms)
    return [E * (rho / norm) if norm > rho else E for E, norm in zip(ema, norms, strict=True)]


def flat_lora_step(
    pairs: Pairs,
    base: torch.optim.Optimizer,
    closure: Closure,
    rho: float,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
) -> Tensor:
    """Take one step of Flat-LoRA: two gradients, the second at the perturbed point."""
    loss = closure()
    targets = _targets(pairs, onto)
    clean = [t.detach().clone() for t in targets]
    with torch.no_grad():
        for target, E in zip(
            targets, _perturbations(pairs, rho, onto, norm_scope, rtol), strict=True
        ):
            target.add_(E)
    closure()
    with torch.no_grad():
        for target, value in zip(targets, clean, strict=True):
            target.copy_(value)
    base.step()
    return loss


def eflat_lora_step(
    pairs: Pairs,
    base: torch.optim.Optimizer,
    closure: Closure,
    ema: list[Tensor],
    rho: float,
    beta: float,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
) -> Tensor:
    """Take one step of EFlat-LoRA: one gradient, at the point perturbed by the moving average.

    ``ema`` holds the moving averages (zeros at the start) and is updated in place; those of A are
    bounded where they are applied.
    """
    targets = _targets(pairs, onto)
    clean = [t.detach().clone() for t in targets]
    with torch.no_grad():
        applied = list(ema)
        if onto != "B":
            applied[: len(pairs)] = bounded(pairs, ema[: len(pairs)], rho, norm_scope)
        for target, mean in zip(targets, applied, strict=True):
            target.add_(mean)
    loss = closure()
    perturbations = _perturbations(pairs, rho, onto, norm_scope, rtol)
    with torch.no_grad():
        for target, value in zip(targets, clean, strict=True):
            target.copy_(value)
    base.step()
    for mean, E in zip(ema, perturbations, strict=True):
        mean.mul_(1 - beta).add_(E, alpha=beta)
    return loss


def lora_sam_step(
    pairs: Pairs,
    base: torch.optim.Optimizer,
    closure: Closure,
    rho: float,
    norm_scope: str = "layer",
) -> Tensor:
    """Take one step of LoRA-SAM: A and B each perturbed along its own gradient."""
    loss = closure()
    squares = [
        _gradient(a).double().square().sum() + _gradient(b).double().square().sum()
        for a, b, _ in pairs
    ]
    if norm_scope == "global":
        squares = [torch.stack(squares).sum()] * len(pairs)
    clean = [(a.detach().clone(), b.detach().clone()) for a, b, _ in pairs]
    with torch.no_grad():
        for (a, b, _), square in zip(pairs, squares, strict=True):
            if square > 0:  # no gradient has no direction
                a.add_(rho * _gradient(a) / square.sqrt())
                b.add_(rho * _gradient(b) / square.sqrt())
    closure()
    with torch.no_grad():
        for (a, b, _), (clean_a, clean_b) in zip(pairs, clean, strict=True):
            a.copy_(clean_a)
            b.copy_(clean_b)
    base.step()
    return loss
