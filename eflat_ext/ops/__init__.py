"""The operators of ``torch.ops.eflat``: call forms, fake kernels, what autograd is told.

The kernels are in ``csrc/``; this file says what PyTorch has to know of them beyond running them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

import eflat_ext._C  # noqa: F401  (registers the operators)

from .autograd import backward, backward_foreach, setup, setup_foreach
from .checks import (
    check_alike,
    check_averages,
    check_devices,
    check_memory,
    check_one_factor,
    check_options,
    check_pair,
    check_pairs,
    check_shapes,
    perturbed,
)


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
    """:func:`perturb` for a list of pairs of any shapes, ranks and dtypes on one device.

    Onto both factors is not the paper's: ``scaling (E_B A + B E_A)``, of norm rho, is then the
    projection of the gradient on the tangent space of the matrices of rank r, and the norm that is
    returned the projection's; where ``scaling E_B E_A`` would be larger than rho / 2, as while B is
    small, E_A is zero (:func:`eflat_ext.reference.tangent`).

    Args:
        onto: the factor that carries the perturbation, "B" or "A", or "both".
        norm_scope: "layer" divides each perturbation by its own norm; "global" all of them by the
            root of the sum of squares, leaving out layers whose norm is not finite.

    Returns:
        The perturbations, one for each pair (onto both, those of all A, then those of all B), and
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


# Fake kernels: shapes and dtypes for tracing.


def _norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    double = bool(tensors) and all(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _norms_like(tensors: Sequence[Tensor]) -> Tensor:
    like = tensors[0] if tensors else torch.empty(0)
    return like.new_empty(len(tensors), dtype=_norm_dtype(tensors))


@torch.library.register_fake("eflat::perturb")
def _(A, B, grad_A, grad_B, scaling, rho, onto="B", rtol=None):
    check_options(rho, onto, "layer", rtol)
    check_one_factor(onto)
    check_pair(A, B, grad_A, grad_B, scaling, "")
    target = B if onto == "B" else A
    return target.new_empty(target.shape), A.new_empty((), dtype=_norm_dtype([A]))


@torch.library.register_fake("eflat::foreach_perturb")
def _(A, B, grad_A, grad_B, scaling, rho, onto="B", norm_scope="layer", rtol=None):
    check_options(rho, onto, norm_scope, rtol)
    check_pairs(A, B, grad_A, grad_B, scaling)
    return [t.new_empty(t.shape) for t in perturbed(onto, A, B)], _norms_like(A)


@torch.library.register_fake("eflat::foreach_perturb_ema_")
def _(
    A,
    B,
    grad_A,
    grad_B,
    E,
    ema,
    skipped,
    scaling,
    rho,
    beta,
    onto="B",
    norm_scope="layer",
    rtol=None,
):
    check_options(rho, onto, norm_scope, rtol)
    check_pairs(A, B, grad_A, grad_B, scaling)
    check_averages(E, ema, skipped, perturbed(onto, A, B), beta)
    return skipped.new_empty(len(A), dtype=_norm_dtype(A))


@torch.library.register_fake("eflat::foreach_adamw_step_")
def _(
    A,
    B,
    grad_A,
    grad_B,
    E,
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
    check_options(rho, onto, norm_scope, rtol)
    check_pairs(A, B, grad_A, grad_B, scaling)
    factors = [*A, *B]
    check_averages(E, ema, skipped, perturbed(onto, A, B), beta)
    check_alike("exp_avg", exp_avg, factors)
    check_alike("exp_avg_sq", exp_avg_sq, factors)
    check_shapes("step", step, [torch.Size()] * len(factors))
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
    return skipped.new_empty(len(A), dtype=_norm_dtype(A))


@torch.library.register_fake("eflat::foreach_bound")
def _(ema, B, scaling, rho, norm_scope="layer"):
    for name, values in (("B", B), ("scaling", scaling)):
        if len(values) != len(ema):
            raise ValueError(f"{name} must have one entry per pair, {len(ema)}, got {len(values)}")
    for name, tensors in (("ema", ema), ("B", B)):
        check_devices(name, tensors, ema[0].device if ema else torch.device("meta"))
    return _norms_like(ema)


# The others have no gradient: nothing is recorded, and what is written in place is marked so.
_library = torch.library.Library("eflat", "FRAGMENT")
for _name in ("foreach_perturb_ema_", "foreach_adamw_step_", "foreach_bound"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


# What an operator writes: the positions and names of those arguments, and their tensors in a call.


def _written(operator):
    return [
        (i, argument.name)
        for i, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _tensors_at(at, arguments):
    value = arguments[at]  # None: the kernel refuses it
    return [value] if isinstance(value, Tensor) else value or ()


def _refuse(written, arguments, is_wrong, says):
    for at, name in written:
        for i, t in enumerate(_tensors_at(at, arguments)):
            if is_wrong(t):
                index = "" if arguments[at] is t else f"[{i}]"
                raise RuntimeError(f"{name}{index} must {says}")


# Tensors whose values are to be negated or conjugated when they are read. torch's fallback resolves
# those that are read; of those that are written it takes one alone, and fails after the call.


def _refuse_lazy_values(operator, key):
    written = _written(operator)

    def resolved(value):
        if isinstance(value, Tensor):
            return value.resolve_conj().resolve_neg()
        return [resolved(x) for x in value] if isinstance(value, (list, tuple)) else value

    def kernel(*arguments):
        _refuse(
            written,
            arguments,
            lambda t: t.is_neg() or t.is_conj(),
            "hold its values as they are, since it is updated in place, got a view that negates or "
            "conjugates them",
        )
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator(*map(resolved, arguments))

    _library.impl(operator, kernel, key)


def _write_in_place(operator):
    written = _written(operator)
    name = operator._schema.name.removeprefix("eflat::")

    def kernel(keyset, *arguments):
        if torch.is_grad_enabled():
            _refuse(
                written,
                arguments,
                attrgetter("requires_grad"),
                f"not require a gradient, since {name} writes to it: call it within "
                "torch.no_grad()",
            )
        if not torch.is_inference_mode_enabled():  # as torch's own operators do
            _refuse(
                written,
                arguments,
                Tensor.is_inference,
                "not be an inference tensor outside InferenceMode, since it is updated in place: "
                "make a clone of it before",
            )
        norms = operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)
        tensors = [t for at, _ in written for t in _tensors_at(at, arguments)]
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
        return norms

    _library.impl(operator, kernel, "ADInplaceOrView", with_keyset=True)


for _operator in (
    torch.ops.eflat.foreach_perturb_ema_.default,
    torch.ops.eflat.foreach_adamw_step_.default,
):
    _write_in_place(_operator)
    for _key in ("Conjugate", "Negative"):
        _refuse_lazy_values(_operator, _key)

torch.library.register_autograd("eflat::perturb", backward, setup_context=setup)
torch.library.register_autograd(
    "eflat::foreach_perturb", backward_foreach, setup_context=setup_foreach
)
