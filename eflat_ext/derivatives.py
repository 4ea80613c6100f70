"""The derivative of the perturbation: its algebra in plain torch, again in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import default_rtol


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
    """``(U, norm, c)`` with ``E = c * U``, the Gram form of :func:`eflat_ext.ops.perturb`.

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


def _differentiable(tensors, scaling, rho, onto, norm_scope, rtol):
    """E and norms of a list of pairs; tensors: all A, all B, all grad_A, all grad_B."""
    count = len(scaling)
    lists = [tensors[i * count : (i + 1) * count] for i in range(4)]
    Us, norms, usable, results = [], [], [], []
    for A, B, grad_A, grad_B, s in zip(*lists, scaling, strict=True):
        cutoff = default_rtol(A, B) if rtol is None else rtol
        pair = [t.double() for t in (A, B, grad_A, grad_B)]
        with torch.no_grad():
            _, norm, _ = gram_form(pair[0], pair[1], pair[2], pair[3], s, rho, onto, cutoff)
            ok = norm.isfinite() & (norm > 0)
        # A layer that is left alone has no gradient; anything that has one stands in for it.
        stand_ins = [torch.eye(*t.shape, dtype=t.dtype, device=t.device) for t in pair]
        pair = [torch.where(ok, t, x) for t, x in zip(pair, stand_ins, strict=True)]
        U, norm, _ = gram_form(pair[0], pair[1], pair[2], pair[3], s, rho, onto, cutoff)
        Us.append(U)
        norms.append(norm)
        usable.append(ok)
    stacked = torch.stack(norms)
    total = stacked.where(torch.stack(usable), 0).square().sum().sqrt()
    for A, U, norm, ok, s in zip(lists[0], Us, norms, usable, scaling, strict=True):
        shared = torch.where(ok, total, 1) if norm_scope == "global" else norm
        E = torch.where(ok, U * (rho / (2 * s**2 * shared)), 0)
        results.append(E.to(A.dtype))
    return results, torch.where(torch.stack(usable), stacked, 0)


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
