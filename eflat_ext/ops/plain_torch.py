"""The operators in plain torch, for devices and ranks that have no kernels.

Pairs of one shape are computed together, by batched matrix products in float64. No value is read on
the host, so that a call does not wait for the device; it is deterministic where torch's operations
are. Unlike the kernels, it does not check that tensors which are written share no memory.

Everything follows from K, with ``K K^T = M^+`` of a factor X and its Gram matrix M: the factor
becomes ``X K``, whose columns are orthonormal or zero, and the other factor's gradient ``G K``. A
Gram matrix has the square of its factor's condition number, so M is corrected by a second one, of
``X T`` with ``T^-T T^-1 = M`` nearly (the idea of CholeskyQR2), and K by a third.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from eflat_ext.reference import default_rtol, perturbed_factors

from .inverse_root import inverse_root, triangular_root

_LARGEST = torch.finfo(torch.float64).max
_CHUNK = 1 << 23  # elements that are computed at once: 64 MB, of which about five copies live
_ROUNDS = 8  # of leaving out layers whose E would not be finite, with one norm for all


class _Batch(NamedTuple):
    """Pairs of one shape and type.

    Attributes:
        indices: of the pairs.
        E: of each perturbed factor, float64, (pairs, rows, columns); zeros where it is not usable.
        usable: which pairs have a perturbation, (pairs, 1, 1).
    """

    indices: list[int]
    E: list[Tensor]
    usable: Tensor


class _Side(NamedTuple):
    """A factor X and its gradient G as (length, r), in terms of the roots K: X K, and G K_other.

    Attributes:
        K: the root of this factor's own.
    """

    X: Tensor
    G: Tensor
    K: Tensor


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
    """Return what ``torch.ops.eflat.foreach_perturb`` does; arguments are checked already."""
    dtypes = [t.dtype for t in A]
    batches, norms = _batches(A, B, grad_A, grad_B, scaling, rho, onto, norm_scope, rtol, dtypes)
    E = list(perturbed_factors(onto, A, B))
    for batch in batches:
        for side, of_side in enumerate(batch.E):
            own = of_side.to(A[batch.indices[0]].dtype).unbind()
            for i, e in zip(batch.indices, own, strict=True):
                E[side * len(A) + i] = e.clone()  # results share no memory
    return E, norms


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
    """Return what ``torch.ops.eflat.perturb`` does."""
    E, norms = foreach_perturb([A], [B], [grad_A], [grad_B], [scaling], rho, onto, "layer", rtol)
    return E[0], norms[0].clone()


def foreach_perturb_ema_(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    E: Sequence[Tensor],
    ema: Sequence[Tensor],
    skipped: Tensor,
    scaling: Sequence[float],
    rho: float,
    beta: float,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
) -> Tensor:
    """Do what ``torch.ops.eflat.foreach_perturb_ema_`` does."""
    points = [
        (t.to(e.dtype) + e).to(t.dtype)
        for t, e in zip(perturbed_factors(onto, A, B), E, strict=False)
    ]
    if points:
        A = points[: len(A)] if onto != "B" else A
        B = points[-len(B) :] if onto != "A" else B
    dtypes = [t.dtype for t in ema[: len(A)]]
    batches, norms = _batches(A, B, grad_A, grad_B, scaling, rho, onto, norm_scope, rtol, dtypes)
    for batch in batches:
        for side, of_side in enumerate(batch.E):
            averages = [ema[side * len(A) + i] for i in batch.indices]
            old = torch.stack(averages)
            new = torch.where(batch.usable, old.lerp(of_side.to(old.dtype), beta), old)
            torch._foreach_copy_(averages, list(new.unbind()))
    skipped.add_((~_usable(norms)).sum())
    return norms


def foreach_adamw_step_(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    E: Sequence[Tensor],
    ema: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    skipped: Tensor,
    scaling: Sequence[float],
    rho: float,
    beta: float,
    lr: Sequence[float],
    beta1: Sequence[float],
    beta2: Sequence[float],
    eps: Sequence[float],
    weight_decay: Sequence[float],
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
) -> Tensor:
    """Do what ``torch.ops.eflat.foreach_adamw_step_`` does, with torch's own AdamW."""
    for i, t in enumerate(step):
        if t.device.type == "cpu" and not t >= 0:
            raise RuntimeError(f"step[{i}] must be at least 0, got {float(t)}")
    norms = foreach_perturb_ema_(
        A, B, grad_A, grad_B, E, ema, skipped, scaling, rho, beta, onto, norm_scope, rtol
    )
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, numbers in enumerate(zip(lr, beta1, beta2, eps, weight_decay, strict=True)):
        groups.setdefault((*numbers, step[i].device.type != "cpu"), []).append(i)
    lists = [[*A, *B], [*grad_A, *grad_B], exp_avg, exp_avg_sq]
    for (rate, b1, b2, epsilon, decay, on_device), chosen in groups.items():
        own = [[tensors[i] for i in chosen] for tensors in lists]
        # 16-bit factors are computed in float32 and rounded once.
        wide = [[t.to(torch.promote_types(t.dtype, torch.float32)) for t in ts] for ts in own]
        factors, gradients, first, second = wide
        adamw(
            factors,
            gradients,
            first,
            second,
            [],
            [step[i] for i in chosen],
            foreach=False,
            capturable=on_device,  # else it would read the steps
            amsgrad=False,
            beta1=b1,
            beta2=b2,
            lr=rate,
            weight_decay=decay,
            eps=epsilon,
            maximize=False,
        )
        for i in (0, 2, 3):
            for result, t in zip(wide[i], own[i], strict=True):
                if result is not t:  # of 16 bits
                    t.copy_(result)
    return norms


def foreach_bound(
    ema: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    rho: float,
    norm_scope: str = "layer",
) -> Tensor:
    """Return what ``torch.ops.eflat.foreach_bound`` does."""
    norms, order = [], []
    for chosen in _chunks(ema, B):
        average, b = (torch.stack([ts[i] for i in chosen]).double() for ts in (ema, B))
        s = _on_device([scaling[i] for i in chosen], b.device)
        square = ((b.mT @ b) * (average @ average.mT)).sum((1, 2)).clamp_min(0)
        norms.append(s.abs() * square.sqrt())
        order += chosen
    norm = _in_order(torch.cat(norms), order)
    if norm_scope == "global":
        norm = norm.norm().expand_as(norm)
    factors = torch.where(norm > rho, rho / norm, 1.0)
    return factors.to(_norm_dtype(ema))


def _norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    double = all(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _usable(norm: Tensor) -> Tensor:
    return (norm > 0) & norm.isfinite()


def _batches(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    scaling: Sequence[float],
    rho: float,
    onto: str,
    norm_scope: str,
    rtol: float | None,
    dtypes: Sequence[torch.dtype],
) -> tuple[list[_Batch], Tensor]:
    """Return the perturbations of all pairs, to be rounded to these types, and the norms."""
    chunks = list(_chunks(A, B))
    order = [i for chosen in chunks for i in chosen]  # of what follows, until the end
    s = _on_device([scaling[i] for i in order], A[0].device)
    of_chunks = s.split([len(chosen) for chosen in chunks])
    made, norms, sizes = [], [], []
    for chosen, own in zip(chunks, of_chunks, strict=True):
        pair = [torch.stack([ts[i] for i in chosen]).double() for ts in (A, B, grad_A, grad_B)]
        a, b = A[chosen[0]], B[chosen[0]]
        U, norm = _directions(pair, own, rho, onto, default_rtol(a, b) if rtol is None else rtol)
        made.append(U)
        norms.append(norm)
        size = torch.stack([u.flatten(1).norm(dim=1) for u in U]).amax(0) / (2 * own * own)
        sizes.append(size / torch.finfo(dtypes[chosen[0]]).max)
    norm = _reported(torch.cat(norms), _norm_dtype(A))
    size = torch.maximum(torch.cat(sizes), 1 / (2 * s * s) / _LARGEST)  # of E and of its scale
    size = size.nan_to_num(math.inf, math.inf)
    norm, scope_norm = _scope_norms(norm, size, rho, norm_scope)
    scale = rho / (2 * s * s * scope_norm)
    norm = torch.where(_usable(norm) & ~scale.isfinite(), math.inf, norm)
    good = _usable(norm)
    scale = torch.where(good, scale, 0)
    batches = []
    lengths = [len(chosen) for chosen in chunks]
    for chosen, U, c, usable in zip(
        chunks, made, scale.split(lengths), good.split(lengths), strict=True
    ):
        c, usable = c[:, None, None], usable[:, None, None]
        batches.append(_Batch(chosen, [torch.where(usable, u.mul_(c), 0) for u in U], usable))
    return batches, _in_order(norm, order).to(_norm_dtype(A))


def _in_order(values: Tensor, indices: list[int]) -> Tensor:
    """Return values that have these indices in the order of the indices."""
    places = torch.tensor(indices).argsort()
    return values[places.to(values.device, non_blocking=True)]


def _on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64).to(device, non_blocking=True)


def _chunks(A: Sequence[Tensor], B: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of pairs of one shape and type, at most ``_CHUNK`` elements at a time."""
    groups: dict[object, list[int]] = {}
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        groups.setdefault((a.shape, b.shape, a.dtype), []).append(i)
    for indices in groups.values():
        a, b = A[indices[0]], B[indices[0]]
        step = max(1, _CHUNK // (2 * (a.numel() + b.numel())))
        yield from (indices[i : i + step] for i in range(0, len(indices), step))


def _reported(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms; one that is zero or infinite in ``dtype`` becomes zero or infinite."""
    rounded = norm.to(dtype).double()
    return torch.where(_usable(rounded), norm, rounded)


def _scope_norms(norm: Tensor, size: Tensor, rho: float, scope: str) -> tuple[Tensor, Tensor]:
    """Return the norms, infinite where E would not be finite in its type, and what divides E."""
    good = _usable(norm)
    if scope == "layer":
        return torch.where(good & ~(rho * size <= norm), math.inf, norm), norm
    # A layer that is left out makes the total smaller, so that another one may have to go, too.
    fits = good
    for _ in range(_ROUNDS):
        fits = fits & (rho * size <= _total(norm, fits))
    total = _total(norm, fits)
    fits = fits & (rho * size <= total)
    return torch.where(good & ~fits, math.inf, norm), total


def _total(norm: Tensor, counted: Tensor) -> Tensor:
    """Return the root of the sum of squares of the norms that are counted."""
    own = torch.where(counted, norm, 0)
    largest = own.amax()
    return largest * (own / torch.where(largest > 0, largest, 1)).square().sum().sqrt()


def _directions(
    pair: Sequence[Tensor],
    s: Tensor,
    rho: float,
    onto: str,
    rtol: float,
) -> tuple[list[Tensor], Tensor]:
    """Return U of each perturbed factor and the norms, for a batch of pairs in float64.

    Args:
        pair: A (pairs, r, m), B (pairs, n, r), and their gradients.
        s: (pairs) scalings.
    """
    A, B, grad_A, grad_B = pair
    count = len(A)
    X_A, G_A = A.mT, grad_A.mT
    R, T = triangular_root(torch.cat([A @ A.mT, B.mT @ B]))
    Y_A, Y_B = X_A @ T[:count], B @ T[count:]
    K, onto_kept = inverse_root(torch.cat([Y_A.mT @ Y_A, Y_B.mT @ Y_B]), R, rtol)
    X_A, X_B = X_A @ K[:count], B @ K[count:]
    correction = (torch.cat([X_A.mT @ X_A, X_B.mT @ X_B]) - onto_kept) / 2
    K = K - K @ correction
    X_A, X_B = X_A - X_A @ correction[:count], X_B - X_B @ correction[count:]
    K_A, K_B = K[:count], K[count:]
    A_side, B_side = _Side(X_A, G_A @ K_B, K_A), _Side(X_B, grad_B @ K_A, K_B)
    size = sum(t.square().sum((1, 2)) for t in pair)
    not_finite = size - size  # NaN where an input is not finite, else 0
    if onto == "both":
        both, norm = _tangent(A_side, B_side, s, rho)
        return both, norm + not_finite
    target, other = (B_side, A_side) if onto == "B" else (A_side, B_side)
    D_t, D_o = target.X.mT @ target.G, other.X.mT @ other.G
    square = target.G.square().sum((1, 2)) + other.G.square().sum((1, 2))
    square = square + 2 * (D_o.mT * D_t).sum((1, 2))
    U = (target.X @ D_o.mT + target.G) @ other.K.mT
    norm = square.clamp_min(0).sqrt() / (2 * s.abs()) + not_finite
    return [U if onto == "B" else U.mT.contiguous()], norm


def _tangent(A: _Side, B: _Side, s: Tensor, rho: float) -> tuple[list[Tensor], Tensor]:
    """Return U of A and B and the norms onto both factors, as ``tangent`` of ``reference``."""
    # Nothing is beside B's columns where they span everything; rounding must not take its place.
    spans = (B.X.square().sum((1, 2)) > B.X.shape[1] - 0.5)[:, None, None]
    beside = torch.where(spans, 0, B.G - B.X @ (B.X.mT @ B.G))
    square = A.G.square().sum((1, 2)) + beside.square().sum((1, 2))
    U_A, U_B = A.G @ B.K.mT, beside @ A.K.mT  # of A transposed
    # || E_B E_A ||^2, of gradients of norm 1, whose fourth powers fit float64
    scale = square[:, None, None]
    product = ((U_A.mT @ U_A / scale) * (U_B.mT @ U_B / scale)).sum((1, 2))
    alone = 2 * rho * product.clamp_min(0).sqrt() > s.abs()
    square = torch.where(alone, B.G.square().sum((1, 2)), square)
    alone = alone[:, None, None]
    U_A = torch.where(alone, 0, U_A)
    U_B = torch.where(alone, B.G @ A.K.mT, U_B)
    return [2 * U_A.mT.contiguous(), 2 * U_B], square.sqrt() / s.abs()
