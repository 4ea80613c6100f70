"""Derivatives of the perturbation: the backward pass computes it again in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from eflat_ext.reference import default_rtol


def gram_form(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float,
    rho: float,
    onto: str = "B",
    rtol: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(U, norm, c)`` with ``E = c * U``, the Gram form of :func:`eflat_ext.ops.perturb`.

    In plain torch and the dtype of its arguments. ``c = rho / (2 scaling^2 norm)``; dividing by
    another norm gives the perturbation of ``norm_scope="global"``.
    """
    rtol = default_rtol(A, B) if rtol is None else rtol
    inverse_A = torch.linalg.pinv(A @ A.T, rtol=rtol**2, hermitian=True)
    inverse_B = torch.linalg.pinv(B.T @ B, rtol=rtol**2, hermitian=True)
    N = grad_A @ A.T
    C = B.T @ grad_B
    square = (
        (inverse_A * (grad_B.T @ grad_B)).sum()
        + (inverse_B * (grad_A @ grad_A.T)).sum()
        + 2 * ((inverse_A @ C.T) * (inverse_B @ N).T).sum()
    )
    norm = square.clamp_min(0).sqrt() / (2 * abs(scaling))
    if onto == "B":
        U = grad_B @ inverse_A + B @ (inverse_B @ N @ inverse_A)
    else:
        U = inverse_B @ grad_A + (inverse_B @ C @ inverse_A) @ A
    return U, norm, rho / (2 * scaling**2 * norm)


def tangent_form(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    scaling: float,
    rho: float,
    rtol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(U_A, U_B, norm)`` onto both factors, for the c of :func:`gram_form`."""
    inverse_A = torch.linalg.pinv(A @ A.T, rtol=rtol**2, hermitian=True)
    inverse_B = torch.linalg.pinv(B.T @ B, rtol=rtol**2, hermitian=True)
    C, K_B = B.T @ grad_B, grad_B.T @ grad_B
    U_A = inverse_B @ grad_A
    U_B = (grad_B - B @ (inverse_B @ C)) @ inverse_A
    of_B = (inverse_A * (K_B - C.T @ inverse_B @ C)).sum().clamp_min(0)
    if B.shape[0] <= B.shape[1]:  # of full rank: no gradient is outside its column space
        U_B, of_B = torch.zeros_like(U_B), torch.zeros_like(of_B)
    square = of_B + (inverse_B * (grad_A @ grad_A.T)).sum().clamp_min(0)
    # ||U_B U_A||
    product = ((U_B.T @ U_B) * (U_A @ U_A.T)).sum().clamp_min(0).sqrt()
    alone = 2 * rho * product > abs(scaling) * square
    U_A, U_B = torch.where(alone, 0, U_A), torch.where(alone, grad_B @ inverse_A, U_B)
    square = torch.where(alone, (inverse_A * K_B).sum().clamp_min(0), square)
    return 2 * U_A, 2 * U_B, square.sqrt() / abs(scaling)


def _forms(pair, scaling, rho, onto, rtol):
    """Return the perturbations of a pair, divided by c, and its norm."""
    A, B, grad_A, grad_B = pair
    if onto == "both":
        U_A, U_B, norm = tangent_form(A, B, grad_A, grad_B, scaling, rho, rtol)
        return [U_A, U_B], norm
    U, norm, _ = gram_form(A, B, grad_A, grad_B, scaling, rho, onto, rtol)
    return [U], norm


def _differentiable(tensors, scaling, rho, onto, norm_scope, rtol):
    """Return E and norms of a list of pairs; tensors: all A, all B, all grad_A, all grad_B."""
    count = len(scaling)
    lists = [tensors[i * count : (i + 1) * count] for i in range(4)]
    Us, norms, usable, results = [], [], [], []
    for A, B, grad_A, grad_B, s in zip(*lists, scaling, strict=True):
        cutoff = default_rtol(A, B) if rtol is None else rtol
        pair = [t.double() for t in (A, B, grad_A, grad_B)]
        with torch.no_grad():
            _, norm = _forms(pair, s, rho, onto, cutoff)
            ok = norm.isfinite() & (norm > 0)
        # A layer without a perturbation has no gradient; a differentiable one stands in for it.
        stand_ins = [torch.eye(*t.shape, dtype=t.dtype, device=t.device) for t in pair]
        pair = [torch.where(ok, t, x) for t, x in zip(pair, stand_ins, strict=True)]
        U, norm = _forms(pair, s, rho, onto, cutoff)
        Us.append(U)
        norms.append(norm)
        usable.append(ok)
    stacked = torch.stack(norms)
    total = stacked.where(torch.stack(usable), 0).square().sum().sqrt()
    for A, U, norm, ok, s in zip(lists[0], Us, norms, usable, scaling, strict=True):
        shared = torch.where(ok, total, 1) if norm_scope == "global" else norm
        c = rho / (2 * s**2 * shared)
        results.append([torch.where(ok, u * c, 0).to(A.dtype) for u in U])
    # Those of all A, then those of all B.
    E = [e for of_factor in zip(*results, strict=True) for e in of_factor]
    return E, torch.where(torch.stack(usable), stacked, 0)


def _gradients(ctx, grad_E, grad_norms):
    again = torch.is_grad_enabled()  # these gradients may be differentiated in turn
    with torch.enable_grad():
        inputs = [
            t if again and t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        ]
        E, norms = _differentiable(inputs, ctx.scaling, ctx.rho, ctx.onto, ctx.norm_scope, ctx.rtol)
        outputs = [*E, norms]
        cotangents = [
            torch.zeros_like(o) if g is None else g.to(o.dtype)
            for o, g in zip(outputs, [*grad_E, grad_norms], strict=True)
        ]
        return torch.autograd.grad(
            outputs, inputs, cotangents, create_graph=again, allow_unused=True
        )


def setup_foreach(ctx, inputs, output):
    A, B, grad_A, grad_B, ctx.scaling, ctx.rho, ctx.onto, ctx.norm_scope, ctx.rtol = inputs
    ctx.save_for_backward(*A, *B, *grad_A, *grad_B)


def backward_foreach(ctx, grad_E, grad_norms):
    count = len(ctx.scaling)
    gradients = _gradients(ctx, grad_E, grad_norms)
    lists = [list(gradients[i * count : (i + 1) * count]) for i in range(4)]
    # The dispatcher drops trailing arguments that equal their defaults and wants as many gradients
    # back as it passed arguments.
    return *lists, *[None] * (len(ctx.needs_input_grad) - len(lists))


def setup(ctx, inputs, output):
    A, B, grad_A, grad_B, scaling, ctx.rho, ctx.onto, ctx.rtol = inputs
    ctx.scaling, ctx.norm_scope = [scaling], "layer"
    ctx.save_for_backward(A, B, grad_A, grad_B)


def backward(ctx, grad_E, grad_norm):
    return *_gradients(ctx, [grad_E], grad_norm.reshape(1)), None, None, None, None


torch.library.register_autograd("eflat::perturb", backward, setup_context=setup)
torch.library.register_autograd(
    "eflat::foreach_perturb", backward_foreach, setup_context=setup_foreach
)
