"""Roots of the pseudo-inverses of Gram matrices, in batches, without reading a value on the host.

Directions below a cutoff are dropped by a projector, from the sign function of a matrix (Newton's
iteration with scaling: Higham, "Functions of Matrices", 2008, chapter 5): an eigenvalue
decomposition of torch waits for the device, to see whether it converged.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps
_SQUARINGS = 12  # the largest eigenvalue to 1e-4 of itself, whatever the others
_NEWTON = 14  # the sign function, for a cutoff of 1e-7


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.mT) / 2


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def triangular_root(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return R with ``R^T R = M``, nearly, and its inverse; the identity for a zero M.

    Args:
        M: (count, r, r) Gram matrices, float64.
    """
    trace = M.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    I = _eye(M)  # noqa: E741
    # The shift makes R invertible where M is not. The larger it is, the less rounding T amplifies,
    # and the less remains of small singular values, which the second Gram matrix has to tell.
    shifted = torch.where((trace > 0) & trace.isfinite(), M + 1e-8 * trace * I, I)
    R = torch.linalg.cholesky_ex(shifted).L.mT
    return R, torch.linalg.solve_triangular(R, I.expand_as(R), upper=True)


def inverse_root(S: Tensor, R: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """Return K with ``K K^T = M^+`` for ``M = R^T S R``, and the projector on what is kept of M.

    S is nearly the identity, but for directions that R was shifted in.
    """
    r = S.shape[-1]
    I = _eye(S)  # noqa: E741
    trace = S.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    shifted = torch.where(trace.isfinite(), S, I) + 4 * r * _EPS * I
    X = torch.linalg.cholesky_ex(shifted).L.mT @ R  # X^T X = M
    X = torch.where(trace == 0, 0, X)
    largest = _largest_singular_value(X)
    # The eigenvalues of [0, X^T; X, 0] are the singular values and their negatives, with the
    # eigenvectors [v; u] and [v; -u].
    relative = X / largest
    cutoff = -rtol * I.expand_as(X)
    dilation = torch.cat([torch.cat([cutoff, relative.mT], 2), torch.cat([relative, cutoff], 2)], 1)
    positive = _eye(dilation) + _sign(dilation)  # the sum of [v; u] [v; u]^T above the cutoff
    onto_v, isometry = positive[:, :r, :r], positive[:, :r, r:]
    # V Sigma V^T of what is kept, which is not squared; anything in the place of the others.
    root = _symmetric(isometry @ X) + largest * (I - onto_v)
    return onto_v @ torch.linalg.inv_ex(root).inverse @ onto_v, onto_v


def _largest_singular_value(X: Tensor) -> Tensor:
    """Return the largest singular value of each X, (count, 1, 1), to 1e-4; 1 for zeros."""
    H = X.mT @ X
    trace = H.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    H = H / torch.where(trace > 0, trace, 1)
    power = H
    for _ in range(_SQUARINGS):
        power = power @ power
        total = power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        power = power / torch.where(total > 0, total, 1)
    share = (H * power).sum((1, 2))[:, None, None]  # of the trace
    return torch.where(share > 0, (share * trace).sqrt(), 1)


def _sign(Z: Tensor) -> Tensor:
    """Return the sign function of symmetric matrices: their eigenvalues become 1 or -1."""
    for _ in range(_NEWTON):
        inverse = _symmetric(torch.linalg.inv_ex(Z).inverse)
        sizes = [M.flatten(1).norm(dim=1)[:, None, None] for M in (Z, inverse)]
        factor = (sizes[1] / sizes[0]).sqrt()
        Z = (Z * factor + inverse / factor) / 2
    return Z
