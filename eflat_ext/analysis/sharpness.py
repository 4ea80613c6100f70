"""Measure the sharpness of a minimum in the full weight space of the adapted layers.

Every function takes a model, ``loss_fn(model, batch)``, which returns the mean loss of the batch,
and batches of equal weight, a list or a loader that can be iterated over more than once. Losses are
taken in eval mode. Weights, gradients and modes are left as they were, bit for bit.

``radius`` is the unit of the radius rho of a perturbation E of the weights W:

    "absolute"   ||E_l|| = rho for every layer l
    "layer"      ||E_l|| = rho ||W_l|| for every layer l
    "filter"     ||e_i|| = rho ||w_i|| for every row i of every layer

This is for ``norm_scope="layer"``, where every layer (every row for "filter") has a radius of its
own. With ``norm_scope="global"`` rho is one norm over the whole model: that of all ``E_l``, of all
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
    """Mean over samples and its standard error."""

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
    """Return ``L(W + E) - L(W)`` for the E of radius rho that is worst to first order.

    E is a multiple of the true gradient of W, as in SAM (Foret et al., 2021). With
    ``norm_scope="global"`` and H the Hessian, the maximum over the ball is higher by at most
    ``rho^2 (lambda_max - lambda_min) / 2``, up to terms of order ``rho^3``. The result is NaN if a
    loss is not finite.

    Args:
        model: A PEFT model; any other model if ``layers`` is given.
        loss_fn: Called with ``model`` and a batch; returns the mean loss of the batch, a scalar.
        batches: A list or a loader with a length, of at least one batch.
        rho: The radius, at least 0.
        norm_scope: "layer" or "global"; see the module.
        radius: "absolute", "layer" or "filter"; see the module.
        layers: Measure the layers whose qualified name ends with one of these; None for all layers
            with an adapter.
        transfer: Perturb this factor, "A" or "B", by EFlat-LoRA's transfer of the gradient that it
            estimates from those of A and B. ``radius`` must not be "filter".
        rtol: Relative cutoff of the transfer's pseudo-inverses; None for the default.
        memory: Bytes on the model's device for shifts and gradients of whole weights. With less
            than all layers need, the gradient takes several passes over the batches.

    Raises:
        ValueError: An argument is out of its range, ``batches`` is empty, or no layer is left.
        TypeError: ``batches`` has no length, or ``layers`` is a string.
        NotImplementedError: The weight of a layer cannot be shifted, or ``radius`` needs a
            quantised weight that PEFT cannot dequantise.
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
    """Return the mean of ``L(W + E) - L(W)`` over random Gaussian directions E of radius rho.

    Every sample averages the rises at E and at -E, which removes the terms of odd order. To second
    order the mean is ``rho^2 tr(H) / 2N`` for N weights (``norm_scope="global"``).

    Args:
        model, loss_fn, batches, rho, norm_scope, radius, layers: As for :func:`worst_case`, which
            raises the same errors.
        samples: Number of samples, at least 2.
        seed: Seed of the random directions.
        clean_loss: ``L(W)`` if it is known, else it is computed.
        on_sample: Called after each sample.

    Returns:
        Mean and standard error over the samples; both NaN if a loss is not finite.
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
    if not all(math.isfinite(value) for value in rises):  # statistics.stdev raises on NaN
        return Average(math.nan, math.nan)
    return Average(statistics.fmean(rises), statistics.stdev(rises) / math.sqrt(samples))


# --- parts of the above, to measure several radii with one gradient -----------------------


def worst_direction(
    layers: Sequence[Layer],
    gradient: Mapping[str, Tensor],
    *,
    norm_scope: Scope = "layer",
    radius: Radius = "absolute",
) -> dict[str, Shift]:
    """Return the shifts of radius 1 that raise the loss most, to first order.

    Args:
        layers: From :func:`eflat_ext.full_space.adapted_layers`.
        gradient: Gradients of the layers' weights, from :func:`eflat_ext.full_space.gradients`.
        norm_scope, radius: See the module.

    Raises:
        ValueError: ``radius`` is none of the three.
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
    """Return the shifts ``s E_B A`` or ``s B E_A`` that EFlat-LoRA's transfer makes at rho = 1.

    Their radius is at most 1, since the transfer projects the full-space perturbation.

    Args:
        model, loss_fn, batches: As for :func:`worst_case`.
        layers: LoRA layers, from :func:`eflat_ext.full_space.adapted_layers`.
        onto: The factor to perturb.
        norm_scope: See the module.
        radius: "absolute" or "layer".
        rtol: Relative cutoff of the pseudo-inverses; None for the default.

    Raises:
        ValueError: ``radius`` is "filter", or a layer has no LoRA pair.
    """
    if radius == "filter":
        raise ValueError("radius must be 'absolute' or 'layer' for a transfer, got 'filter'")
    if not all(layer.pairs for layer in layers):
        raise ValueError("layers must be LoRA layers for a transfer, got one without factors")
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
    """Return ``L(W + rho D) - L(W)`` for given shifts D of radius 1.

    Args:
        model, loss_fn, batches, layers: As for :func:`eflat_ext.full_space.mean_loss`.
        unit: D, from :func:`worst_direction` or :func:`transferred_direction`.
        rho: The radius, of either sign.
        clean_loss: ``L(W)`` if it is known, else it is computed.
    """
    if clean_loss is None:
        clean_loss = mean_loss(model, loss_fn, batches)
    shifts = {name: partial(_times, rho, shift) for name, shift in unit.items()}
    return mean_loss(model, loss_fn, batches, layers, shifts) - clean_loss


# --- helpers -----------------------------------------------------------------------------


def _scales(layers: Sequence[Layer], radius: str) -> dict[str, Tensor]:
    """Return the factor of rho in each layer, (1, 1) or (n, 1) for "filter", in float64."""
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
    """Return the shifts ``T^power X / ||T^(power - 1) X||`` with T the scales; 0 for a norm of 0.

    ``power`` is 2 for gradients and 1 for noise. With "absolute" T is the identity.
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
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
