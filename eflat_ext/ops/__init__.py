"""The operators ``torch.ops.eflat.*`` and their public call forms.

The kernels are in ``csrc/``; what has none is computed in plain torch (:mod:`.plain_torch`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from . import schemas  # noqa: F401  (defines the operators; before what adds to them)

if importlib.util.find_spec("eflat_ext._C") is not None:  # else all is computed in plain torch
    import eflat_ext._C  # noqa: F401  (registers the CPU kernels)

from . import autograd, fake, in_place, no_kernel  # noqa: F401  (add to the operators)
from .checks import check_memory, check_one_factor, check_options, check_pair, check_pairs


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
    """Compute the full-space perturbation of a LoRA pair, carried by one factor.

    With ``W = W0 + scaling * B @ A``: equations (1)-(3) of EFlat-LoRA (arXiv 2508.00522) from r x r
    Gram matrices, without an n x m matrix. Differentiable in ``A, B, grad_A, grad_B`` where both
    factors have full rank.

    Args:
        A: (r, m) factor; float64, float32, bfloat16 or float16; any strides.
        B: (n, r) factor, same dtype and device.
        grad_A, grad_B: gradients of the loss, like A and B. A frozen factor's is zeros.
        scaling: the layer's scaling ``s``, not 0.
        rho: radius of the perturbation in the full weight space, >= 0.
        onto: the perturbed factor, "B" or "A".
        rtol: a singular value of a factor counts as zero when at most rtol times its largest;
            None for ``min(max(n, m, r) * eps32, 1e-3)`` (float64: ``max(1e-7, max(n, m, r) *
            eps64)``); at least 1e-7.

    Returns:
        E, with dtype and shape of B (of A for ``onto="A"``), and the 0-d norm of the full-space
        gradient estimate, float64 for float64 inputs, else float32. Where the norm is zero or not
        finite E is zero; a norm of ``E`` beyond the largest number of its dtype makes the norm
        infinite.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, rank or value.
    """
    try:
        return torch.ops.eflat.perturb(A, B, grad_A, grad_B, scaling, rho, onto, rtol)
    except RuntimeError:
        check_options(rho, onto, "layer", rtol)
        check_one_factor(onto)
        check_pair(A, B, grad_A, grad_B, scaling, "")
        check_memory({"A": A, "B": B, "grad_A": grad_A, "grad_B": grad_B})
        raise


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
    """Compute :func:`perturb` for pairs of any shapes, ranks and dtypes on one device.

    ``onto="both"`` is not the paper's: ``scaling (E_B A + B E_A)``, of norm rho, is then along the
    projection of the gradient on the tangent space of the matrices of rank r, and the returned norm
    is the projection's. Where ``scaling E_B E_A`` would be larger than rho / 2, as long as B is
    small, E_A is zero (:func:`eflat_ext.reference.tangent`).

    Args:
        onto: the perturbed factor, "B" or "A", or "both".
        norm_scope: "layer" divides each perturbation by its own norm; "global" all of them by the
            root of the sum of squares, leaving out layers whose norm is not finite.

    Returns:
        The perturbations, one for each pair (onto both, E_A of all pairs, then E_B of all), and
        the norms per layer as one tensor (float64 when all inputs are, else float32). Empty lists
        give an empty list and an empty tensor.

    Raises:
        TypeError, ValueError: as :func:`perturb`; lists of different lengths; several devices.
    """
    try:
        return torch.ops.eflat.foreach_perturb(
            A, B, grad_A, grad_B, scaling, rho, onto, norm_scope, rtol
        )
    except RuntimeError:
        check_options(rho, onto, norm_scope, rtol)
        check_pairs(A, B, grad_A, grad_B, scaling)
        check_memory({"A": A, "B": B, "grad_A": grad_A, "grad_B": grad_B})
        raise
