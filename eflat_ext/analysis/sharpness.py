"""How sharp a minimum is, in the full space of the adapted layers or of the factors.

Every function takes a model, ``loss_fn(model, batch)`` (the batch's mean loss) and batches that can
be walked through again and again; each batch counts the same. Losses are taken in eval mode, and
weights, gradients and modes are the same afterwards, bit for bit.

``radius`` says what the radius rho of a perturbation E of the weights W is measured in:

    "absolute"   ||E|| = rho
    "layer"      ||E_l|| = rho ||W_l|| in every layer l
    "filter"     ||e_i|| = rho ||w_i|| in every row i of every layer

With ``norm_scope="layer"`` each layer (each row for "filter") moves by a radius of its own. With
"global" all layers share one: rho is then the norm, over the whole model, of E, of all
``E_l / ||W_l||`` or of all ``e_i / ||w_i||``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from eflat_ext.ops import foreach_perturb
from eflat_ext.ops.checks import check_options

from .full_space import MEMORY, Layer, LossFn, Shift, adapted_layers, gradients, mean_loss

Radius = Literal["absolute", "layer", "filter"]
Scope = Literal["layer", "global"]
RADII = ("absolute", "layer", "filter")


class Average(NamedTuple):
    """A mean over samples and its standard error."""

    mean: float
    standard_error: float


def worst_case(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    rho: float,
    *,
    norm_scope: Scope = "layer",
    radius: Radius = "absolute",
    layers: Sequence[str] | None = None,
    transfer: Literal["A", "B"] | None = None,
    rtol: float | None = None,
    memory: int = MEMORY,
) -> float:
    """``L(W + E) - L(W)`` at the worst E of radius rho to first order.

    E lies along the true gradient of W. With H the Hessian and ``norm_scope="global"``, the worst
    point of the whole ball is higher by no more than ``rho^2 (lambda_max - lambda_min) / 2``, and
    terms of order rho^3; never lower. A loss that is not finite gives NaN.

    Args:
        model: a PEFT model, or any other if ``layers`` is given.
        loss_fn, batches: see the module.
        rho: the radius, at least 0. norm_scope, radius: see the module.
        layers: names of the layers, their ends suffice; by default all with an adapter.
        transfer: perturb this factor by EFlat-LoRA's transfer instead, which sees the gradients
            of A and B alone; radius may not be "filter".
        rtol: cutoff of the transfer's pseudo-inverses.
        memory: bytes on the model's device for gradients of whole weights at a time.

    Raises:
        ValueError, TypeError, NotImplementedError: an argument is not as said here.
    """
    check_options(rho, transfer or "B", norm_scope, rtol)
    found = adapted_layers(model, layers)
    if transfer is None:
        gradient, _ = gradients(model, loss_fn, batches, found, memory=memory)
        unit = worst_direction(found, gradient, norm_scope=norm_scope, radius=radius)
    else:
        unit = transferred_direction(
            model,
            loss_fn,
            batches,
            found,
            transfer,
            norm_scope=norm_scope,
            radius=radius,
            rtol=rtol,
        )
    return rise(model, loss_fn, batches, found, unit, rho)


def average_case(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    rho: float,
    *,
    samples: int = 10,
    seed: int = 0,
    norm_scope: Scope = "layer",
    radius: Radius = "absolute",
    layers: Sequence[str] | None = None,
    clean_loss: float | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> Average:
    """``L(W + E) - L(W)`` for random E of radius rho in the full space, its mean over samples.

    A sample is the mean of the rises at E and -E, which have the same distribution: so the odd
    orders, which average to nothing, add no noise. To second order the mean is
    ``rho^2 tr(H) / 2N`` for N weights (``norm_scope="global"``).

    Args:
        model, loss_fn, batches, rho, norm_scope, radius, layers: as for :func:`worst_case`.
        samples: at least 2, for the standard error. seed: of the noise.
        clean_loss: L(W), if known. on_sample: called after each sample.

    Returns:
        Both NaN where a loss is not finite.
    """
    check_options(rho, "B", norm_scope, None)
    _check_count("samples", samples, 2)
    found = adapted_layers(model, layers)
    scales = _scales(found, radius)
    if clean_loss is None:
        clean_loss = mean_loss(model, loss_fn, batches)
    generator = torch.Generator().manual_seed(seed)
    rises = []
    for _ in range(samples):
        noise = {x.name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in found}
        unit = _of_unit_radius(found, noise, scales, norm_scope, radius, power=1)
        both = [
            rise(model, loss_fn, batches, found, unit, sign * rho, clean_loss) for sign in (1, -1)
        ]
        rises.append(statistics.fmean(both))
        on_sample()
    if not all(math.isfinite(value) for value in rises):  # statistics.stdev takes none of these
        return Average(math.nan, math.nan)
    return Average(statistics.fmean(rises), statistics.stdev(rises) / math.sqrt(samples))


# --- the same in steps, for several radii ------------------------------------------------


def worst_direction(
    layers: Sequence[Layer],
    gradient: Mapping[str, Tensor],
    *,
    norm_scope: Scope = "layer",
    radius: Radius = "absolute",
) -> dict[str, Shift]:
    """The shifts of radius 1 that raise the loss most, given the gradient of every layer's weight.

    Args:
        layers: from :func:`adapted_layers`. gradient: from :func:`gradients`.
        norm_scope, radius: see the module.
    """
    return _of_unit_radius(layers, gradient, _scales(layers, radius), norm_scope, radius, power=2)


def transferred_direction(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    layers: Sequence[Layer],
    onto: Literal["A", "B"] = "B",
    *,
    norm_scope: Scope = "layer",
    radius: Radius = "absolute",
    rtol: float | None = None,
) -> dict[str, Shift]:
    """What ``rho = 1`` becomes of the transfer onto one factor: ``s E_B A`` or ``s B E_A``.

    Its own radius is less than 1: the transfer keeps a part of the perturbation.
    """
    if radius == "filter":
        raise ValueError("radius must be 'absolute' or 'layer' for a transfer, got 'filter'")
    if not all(layer.pairs for layer in layers):
        raise ValueError("model: expected LoRA layers, a transfer needs their factors")
    pairs = [pair for layer in layers for pair in layer.pairs]
    _, of_factors = gradients(model, loss_fn, batches, pairs=pairs)
    A, B = [pair.A.detach() for pair in pairs], [pair.B.detach() for pair in pairs]
    grad_A = [a.to(pair.A) for (a, _), pair in zip(of_factors, pairs, strict=True)]
    grad_B = [b.to(pair.B) for (_, b), pair in zip(of_factors, pairs, strict=True)]
    scaling = [pair.scaling for pair in pairs]
    E, norms = foreach_perturb(A, B, grad_A, grad_B, scaling, 1.0, onto, "layer", rtol)
    scales = _scales(layers, radius)
    T = [float(scales[layer.name]) for layer in layers for _ in layer.pairs]
    weighted = [
        t * norm if math.isfinite(norm) else 0.0 for t, norm in zip(T, norms.tolist(), strict=True)
    ]
    total = math.hypot(*weighted)
    if norm_scope == "global":
        T = [t * own / total if total else 0.0 for t, own in zip(T, weighted, strict=True)]
    unit: dict[str, Shift] = {}
    start = 0
    for layer in layers:
        own = slice(start, start := start + len(layer.pairs))
        terms = list(zip(T[own], scaling[own], E[own], A[own], B[own], strict=True))
        unit[layer.name] = partial(_low_rank, terms, onto)
    return unit


def rise(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    layers: Sequence[Layer],
    unit: Mapping[str, Shift],
    rho: float,
    clean_loss: float | None = None,
) -> float:
    """``L(W + rho D) - L(W)`` for given shifts D of radius 1.

    Args:
        model, loss_fn, batches, layers: as for :func:`mean_loss`.
        unit: from :func:`worst_direction` or :func:`transferred_direction`. rho: of any sign.
        clean_loss: L(W), if known.
    """
    if clean_loss is None:
        clean_loss = mean_loss(model, loss_fn, batches)
    shifts = {name: partial(_times, rho, shift) for name, shift in unit.items()}
    return mean_loss(model, loss_fn, batches, layers, shifts) - clean_loss


# --- inner parts -------------------------------------------------------------------------


def _scales(layers: Sequence[Layer], radius: str) -> dict[str, Tensor]:
    """What rho is multiplied with in each layer: (1, 1), or (n, 1) for "filter"; float64."""
    if radius not in RADII:
        raise ValueError(f"radius must be 'absolute', 'layer' or 'filter', got {radius!r}")
    scales = {}
    for layer in layers:
        if radius == "absolute":
            scales[layer.name] = torch.ones(1, 1, dtype=torch.float64)
            continue
        rows = torch.linalg.vector_norm(layer.weight(), dim=1, keepdim=True, dtype=torch.float64)
        scales[layer.name] = (rows if radius == "filter" else rows.norm().view(1, 1)).cpu()
    return scales


def _of_unit_radius(
    layers: Sequence[Layer],
    X: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    norm_scope: str,
    radius: str,
    power: int,
) -> dict[str, Shift]:
    """The shifts ``T^power X / ||T^(power - 1) X||``, T the scales: 2 for gradients, 1 for noise.

    For T the identity both are X over its norm. Where the norm is 0 the shift is.
    """
    rows = {
        name: torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).cpu()
        * scales[name] ** (power - 1)
        for name, x in X.items()
    }
    if norm_scope == "global":
        one = torch.stack([r.square().sum() for r in rows.values()]).sum().sqrt().view(1, 1)
        norms = dict.fromkeys(rows, one)
    elif radius == "filter":
        norms = rows
    else:
        norms = {name: r.norm().view(1, 1) for name, r in rows.items()}
    unit: dict[str, Shift] = {}
    for layer in layers:
        factor = scales[layer.name] ** power / norms[layer.name]
        factor = torch.where(norms[layer.name] == 0, 0.0, factor)
        unit[layer.name] = partial(_scaled, X[layer.name], factor.to(layer.dtype), layer.device)
    return unit


def _scaled(x: Tensor, factor: Tensor, device: torch.device) -> Tensor:
    return x.to(device) * factor.to(device)


def _times(rho: float, shift: Shift) -> Tensor:
    return rho * shift()


def _low_rank(terms: Sequence[tuple[float, float, Tensor, Tensor, Tensor]], onto: str) -> Tensor:
    products = [
        factor * s * (E.double() @ A.double() if onto == "B" else B.double() @ E.double())
        for factor, s, E, A, B in terms
    ]
    return (
        torch.stack(products).sum(dim=0).to(torch.promote_types(terms[0][2].dtype, torch.float32))
    )


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
