"""Fake kernels: the shapes and dtypes of results, for tracing and tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eflat_ext.reference import perturbed_factors

from .checks import (
    check_averages,
    check_bound,
    check_moments,
    check_norm_scope,
    check_one_factor,
    check_options,
    check_pair,
    check_pairs,
    check_rho,
)


def _norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    double = bool(tensors) and all(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _norms_like(tensors: Sequence[Tensor]) -> Tensor:
    like = tensors[0] if tensors else torch.empty(0)
    return like.new_empty(len(tensors), dtype=_norm_dtype(tensors))


def perturb(A, B, grad_A, grad_B, scaling, rho, onto="B", rtol=None):
    check_options(rho, onto, "layer", rtol)
    check_one_factor(onto)
    check_pair(A, B, grad_A, grad_B, scaling, "")
    target = B if onto == "B" else A
    return target.new_empty(target.shape), A.new_empty((), dtype=_norm_dtype([A]))


def foreach_perturb(A, B, grad_A, grad_B, scaling, rho, onto="B", norm_scope="layer", rtol=None):
    check_options(rho, onto, norm_scope, rtol)
    check_pairs(A, B, grad_A, grad_B, scaling)
    return [t.new_empty(t.shape) for t in perturbed_factors(onto, A, B)], _norms_like(A)


def foreach_perturb_ema_(
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
    check_averages(A, B, E, ema, skipped, beta, onto)
    return skipped.new_empty(len(A), dtype=_norm_dtype(A))


def foreach_adamw_step_(
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
    check_averages(A, B, E, ema, skipped, beta, onto)
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    check_moments(A, B, exp_avg, exp_avg_sq, step, numbers)
    return skipped.new_empty(len(A), dtype=_norm_dtype(A))


def foreach_bound(ema, B, scaling, rho, norm_scope="layer"):
    check_rho(rho)
    check_norm_scope(norm_scope)
    check_bound(ema, B, scaling)
    return _norms_like(ema)


KERNELS: dict[str, Callable[..., Any]] = {
    "perturb": perturb,
    "foreach_perturb": foreach_perturb,
    "foreach_perturb_ema_": foreach_perturb_ema_,
    "foreach_adamw_step_": foreach_adamw_step_,
    "foreach_bound": foreach_bound,
}
for _name, _kernel in KERNELS.items():
    torch.library.register_fake(f"eflat::{_name}", _kernel)
