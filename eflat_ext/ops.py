"""The operators of ``torch.ops.eflat``: call forms, fake kernels, autograd, argument errors.

The kernels are in ``csrc/``; this file says what PyTorch has to know of them beyond running them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import eflat_ext._C  # noqa: F401  (registers the operators)

from .reference import default_rtol

_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256
MIN_RTOL = 1e-7


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
    """Full-space perturbation of a LoRA pair ``W = W0 + scaling * B @ A``, carried by one factor.

    Equations (1)-(3) of EFlat-LoRA (arXiv 2508.00522), from r x r Gram matrices: no n x m matrix is
    formed. Differentiable in ``A, B, grad_A, grad_B`` where both factors have full rank.

    Args:
        A: (r, m) factor; float64, float32, bfloat16 or float16; 1 <= r <= 256; any strides.
        B: (n, r) factor, same dtype and device.
        grad_A, grad_B: gradients of the loss, like A and B. A frozen factor's is zeros.
        scaling: the layer's scaling ``s``, not 0.
        rho: radius of the perturbation in the full weight space, >= 0.
        onto: the factor that carries the perturbation, "B" or "A".
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
        _check_options(rho, onto, "layer", rtol)
        _check_pair(A, B, grad_A, grad_B, scaling, "")
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
    """:func:`perturb` for a list of pairs of any shapes, ranks and dtypes on one device.

    Args:
        norm_scope: "layer" divides each perturbation by its own norm; "global" all of them by the
            root of the sum of squares, leaving out layers whose norm is not finite.

    Returns:
        The perturbations, and the norms per layer as one tensor (float64 when all inputs are, else
        float32). Empty lists give an empty list and an empty tensor.

    Raises:
        TypeError, ValueError: as :func:`perturb`; lists of different lengths; several devices.
    """
    try:
        return torch.ops.eflat.foreach_perturb(
            A, B, grad_A, grad_B, scaling, rho, onto, norm_scope, rtol
        )
    except RuntimeError:
        _check_options(rho, onto, norm_scope, rtol)
        _check_pairs(A, B, grad_A, grad_B, scaling)
        raise


def _check_options(rho: float, onto: str, norm_scope: str, rtol: float | None) -> None:
    for name, value in (("rho", rho), ("rtol", rtol)):
        if not (isinstance(value, (int, float)) or (name == "rtol" and value is None)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho must be finite and at least 0, got {rho}")
    if onto not in ("A", "B"):
        raise ValueError(f"onto must be 'B' or 'A', got {onto!r}")
    if norm_scope not in ("layer", "global"):
        raise ValueError(f"norm_scope must be 'layer' or 'global', got {norm_scope!r}")
    if rtol is not None and not MIN_RTOL <= rtol < 1:
        raise ValueError(f"rtol must be None or in [{MIN_RTOL}, 1), got {rtol}")


def _check_pairs(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    scaling: Sequence[float],
) -> None:
    lists = {"A": A, "B": B, "grad_A": grad_A, "grad_B": grad_B, "scaling": scaling}
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {type(values).__name__}")
        if len(values) != len(A):
            raise ValueError(f"{name} must have one entry per pair, {len(A)}, got {len(values)}")
    for i, pair in enumerate(zip(A, B, grad_A, grad_B, scaling, strict=True)):
        _check_pair(*pair, f"[{i}]")
        if pair[0].device != A[0].device:
            raise ValueError(
                f"A[{i}] must be on the device of A[0], {A[0].device}, got {pair[0].device}"
            )


def _check_pair(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float, index: str
) -> None:
    named = {f"A{index}": A, f"B{index}": B, f"grad_A{index}": grad_A, f"grad_B{index}": grad_B}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.dtype not in _FACTOR_DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
            )
        if tensor.dtype != A.dtype:
            raise TypeError(
                f"{name} must have the dtype of A{index}, {A.dtype}, got {tensor.dtype}"
            )
        if tensor.device != A.device:
            raise ValueError(
                f"{name} must be on the device of A{index}, {A.device}, got {tensor.device}"
            )
    if A.dim() != 2:
        raise ValueError(f"A{index} must be 2-d, (r, m), got shape {tuple(A.shape)}")
    if B.dim() != 2:
        raise ValueError(f"B{index} must be 2-d, (n, r), got shape {tuple(B.shape)}")
    if B.shape[1] != A.shape[0]:
        raise ValueError(
            f"B{index} must be (n, r) for A{index} of shape (r, m) = {tuple(A.shape)}, "
            f"got shape {tuple(B.shape)}"
        )
    for grad, factor, name in ((grad_A, A, "A"), (grad_B, B, "B")):
        if grad.shape != factor.shape:
            raise ValueError(
                f"grad_{name}{index} must have the shape of {name}{index}, {tuple(factor.shape)}, "
                f"got {tuple(grad.shape)}"
            )
    if not 1 <= A.shape[0] <= MAX_RANK:
        raise ValueError(f"the rank of A{index} must be 1 to {MAX_RANK}, got {A.shape[0]}")
    if A.numel() == 0 or B.numel() == 0:
        raise ValueError(
            f"A{index} and B{index} must not be empty, got shapes {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling{index} must be a number, got {type(scaling).__name__}")
    if not math.isfinite(scaling) or scaling == 0:
        raise ValueError(f"scaling{index} must be finite and not 0, got {scaling}")


# Fake kernels: shapes and dtypes for tracing.


def _check_averages(
    ema: Sequence[Tensor], skipped: Tensor, targets: Sequence[Tensor], beta: float
) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    _check_alike("ema", ema, targets)
    if targets and skipped.device != targets[0].device:
        raise ValueError(
            f"skipped must be on the device of A[0], {targets[0].device}, got {skipped.device}"
        )


def _check_alike(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    _check_shapes(name, tensors, [t.shape for t in like])
    for one in like[:1]:
        _check_devices(name, tensors, one.device)


def _check_devices(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    # A call with one tensor on meta among others comes here too, and would seem to succeed.
    for i, t in enumerate(tensors):
        if t.device != device:
            raise ValueError(f"{name}[{i}] must be on the device {device}, got {t.device}")


def _check_shapes(name: str, tensors: Sequence[Tensor], expected: Sequence[torch.Size]) -> None:
    if [t.shape for t in tensors] != list(expected):
        raise ValueError(
            f"{name} must have the shapes {[tuple(shape) for shape in expected]}, "
            f"got {[tuple(t.shape) for t in tensors]}"
        )


def _norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if all(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("eflat::perturb")
def _(A, B, grad_A, grad_B, scaling, rho, onto="B", rtol=None):
    _check_options(rho, onto, "layer", rtol)
    _check_pair(A, B, grad_A, grad_B, scaling, "")
    target = B if onto == "B" else A
    return target.new_empty(target.shape), A.new_empty((), dtype=_norm_dtype([A]))


@torch.library.register_fake("eflat::foreach_perturb")
def _(A, B, grad_A, grad_B, scaling, rho, onto="B", norm_scope="layer", rtol=None):
    _check_options(rho, onto, norm_scope, rtol)
    _check_pairs(A, B, grad_A, grad_B, scaling)
    targets = B if onto == "B" else A
    norms = A[0].new_empty(len(A), dtype=_norm_dtype(A)) if A else torch.empty(0)
    return [t.new_empty(t.shape) for t in targets], norms


@torch.library.register_fake("eflat::foreach_perturb_ema_")
def _(
    A,
    B,
    grad_A,
    grad_B,
    ema,
    skipped,
    scaling,
    rho,
    beta,
    onto="B",
    norm_scope="layer",
    rtol=None,
):
    _check_options(rho, onto, norm_scope, rtol)
    _check_pairs(A, B, grad_A, grad_B, scaling)
    _check_averages(ema, skipped, B if onto == "B" else A, beta)
    return skipped.new_empty(len(A), dtype=_norm_dtype(A) if A else torch.float32)


@torch.library.register_fake("eflat::foreach_adamw_step_")
def _(
    A,
    B,
    grad_A,
    grad_B,
    clean,
    ema,
    exp_avg,
    exp_avg_sq,
    step,
    skipped,
    scaling,
    rho,
    beta,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    onto="B",
    norm_scope="layer",
    rtol=None,
):
    _check_options(rho, onto, norm_scope, rtol)
    _check_pairs(A, B, grad_A, grad_B, scaling)
    targets, factors = list(B if onto == "B" else A), [*A, *B]
    _check_averages(ema, skipped, targets, beta)
    _check_alike("clean", clean, targets)
    _check_alike("exp_avg", exp_avg, factors)
    _check_alike("exp_avg_sq", exp_avg_sq, factors)
    _check_shapes("step", step, [torch.Size()] * len(factors))
    for i, t in enumerate(step):
        if t.device not in (torch.device("cpu"), factors[i].device):
            raise ValueError(f"step[{i}] must be on the CPU or {factors[i].device}, got {t.device}")
    for name, values in (
        ("lr", lr),
        ("beta1", beta1),
        ("beta2", beta2),
        ("eps", eps),
        ("weight_decay", weight_decay),
    ):
        if len(values) != len(factors):
            raise ValueError(
                f"{name} must have two entries per pair, {len(factors)}, got {len(values)}"
            )
    return skipped.new_empty(len(A), dtype=_norm_dtype(A) if A else torch.float32)


@torch.library.register_fake("eflat::foreach_bound")
def _(ema, B, scaling, rho, norm_scope="layer"):
    for name, tensors in (("ema", ema), ("B", B)):
        _check_devices(name, tensors, ema[0].device if ema else torch.device("meta"))
    return ema[0].new_empty(len(ema), dtype=_norm_dtype(ema)) if ema else torch.empty(0)


# Autograd: the derivative of the same algebra in plain torch, recomputed in the backward pass.


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
    """The Gram form of :func:`perturb` in plain torch: ``(U, norm, c)`` with ``E = c * U``.

    In the dtype of its arguments. ``c = rho / (2 scaling^2 norm)``; dividing by another norm gives
    the perturbation of ``norm_scope="global"``.
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


def _setup_foreach(ctx, inputs, output):
    A, B, grad_A, grad_B, ctx.scaling, ctx.rho, ctx.onto, ctx.norm_scope, ctx.rtol = inputs
    ctx.save_for_backward(*A, *B, *grad_A, *grad_B)


def _backward_foreach(ctx, grad_E, grad_norms):
    count = len(ctx.scaling)
    gradients = _gradients(ctx, grad_E, grad_norms)
    lists = [list(gradients[i * count : (i + 1) * count]) for i in range(4)]
    # The dispatcher drops trailing arguments that equal their defaults and wants as many gradients
    # back as it passed arguments.
    return *lists, *[None] * (len(ctx.needs_input_grad) - len(lists))


def _setup(ctx, inputs, output):
    A, B, grad_A, grad_B, scaling, ctx.rho, ctx.onto, ctx.rtol = inputs
    ctx.scaling, ctx.norm_scope = [scaling], "layer"
    ctx.save_for_backward(A, B, grad_A, grad_B)


def _backward(ctx, grad_E, grad_norm):
    return *_gradients(ctx, [grad_E], grad_norm.reshape(1)), None, None, None, None


# The others have no gradient: nothing is recorded, and what is written in place is marked so.
_library = torch.library.Library("eflat", "FRAGMENT")
for _name in ("foreach_perturb_ema_", "foreach_adamw_step_", "foreach_bound"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _perturb_ema_in_place(keyset, A, B, grad_A, grad_B, ema, skipped, *options):
    norms = torch.ops.eflat.foreach_perturb_ema_.default.redispatch(
        keyset & torch._C._after_ADInplaceOrView_keyset,
        *(A, B, grad_A, grad_B, ema, skipped, *options),
    )
    torch.autograd.graph.increment_version([*ema, skipped])
    return norms


def _adamw_step_in_place(
    keyset, A, B, grad_A, grad_B, clean, ema, exp_avg, exp_avg_sq, step, skipped, *options
):
    written = [*A, *B, *ema, *exp_avg, *exp_avg_sq, *step, skipped]
    if torch.is_grad_enabled() and any(t.requires_grad for t in written):
        raise RuntimeError(
            "foreach_adamw_step_ writes to tensors that require a gradient: call it within "
            "torch.no_grad()"
        )
    norms = torch.ops.eflat.foreach_adamw_step_.default.redispatch(
        keyset & torch._C._after_ADInplaceOrView_keyset,
        *(A, B, grad_A, grad_B, clean, ema, exp_avg, exp_avg_sq, step, skipped, *options),
    )
    torch.autograd.graph.increment_version(written)
    return norms


_library.impl("foreach_perturb_ema_", _perturb_ema_in_place, "ADInplaceOrView", with_keyset=True)
_library.impl("foreach_adamw_step_", _adamw_step_in_place, "ADInplaceOrView", with_keyset=True)

torch.library.register_autograd("eflat::perturb", _backward, setup_context=_setup)
torch.library.register_autograd(
    "eflat::foreach_perturb", _backward_foreach, setup_context=_setup_foreach
)
