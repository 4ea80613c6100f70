"""The Hessian's largest eigenvalues and trace: Lanczos and Hutch++ of hessian-eigenthings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .full_space import (
    Layer,
    LossFn,
    adapted_layers,
    check_batches,
    constant,
    evaluating,
    mean_loss,
    requiring_gradients,
    shifted,
)

Space = Literal["lora", "full"]
Product = Literal["exact", "finite-difference"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What :func:`hessian` found.

    Attributes:
        size: N, the number of weights.
        eigenvalues: the largest, in falling order.
        residuals: ``||H v - lambda v||`` of each.
        vectors: (k, N), their eigenvectors: one row holds the layers' (n, m) shifts one after the
            other for the full space, and A and B of pair after pair for the factors.
        trace: of the Hessian; NaN if not asked for.
        trace_standard_error: of the trace; NaN with fewer than 6 products.
    """

    size: int
    eigenvalues: list[float]
    residuals: list[float]
    vectors: Tensor
    trace: float
    trace_standard_error: float


def hessian(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    space: Space = "full",
    eigenvalues: int = 3,
    iterations: int | None = None,
    trace_products: int = 30,
    product: Product = "exact",
    seed: int = 0,
    layers: Sequence[str] | None = None,
    on_product: Callable[[], None] = lambda: None,
) -> Spectrum:
    """The largest eigenvalues and the trace of the Hessian of the mean loss, in eval mode.

    It keeps one vector of N float32 numbers for each iteration or a third of the products. A loss
    that is not finite gives NaN.

    Args:
        model, loss_fn, batches, layers: as for :func:`eflat_ext.sharpness.worst_case`.
        space: "full", the adapted layers' whole weights, or "lora", their factors A and B.
        eigenvalues: how many, at least 1 and at most N.
        iterations: of Lanczos; by default four for each eigenvalue and at least 20.
        trace_products: Hessian-vector products for the trace, 0 to leave it out.
        product: "exact" differentiates twice, with attention in its plain form; "finite-difference"
            takes two gradients and works with every kernel, to about four digits in float32.
        seed: of the start vector and of the trace's samples.
        on_product: called after each product.

    Raises:
        ImportError: hessian-eigenthings is not installed.
        ValueError, TypeError, NotImplementedError: an argument is not as said here.
    """
    check_batches(batches)
    if space not in ("full", "lora"):
        raise ValueError(f"space must be 'full' or 'lora', got {space!r}")
    if product not in ("exact", "finite-difference"):
        raise ValueError(f"product must be 'exact' or 'finite-difference', got {product!r}")
    found = adapted_layers(model, layers)
    if space == "lora" and not all(layer.pairs for layer in found):
        raise ValueError("model: expected LoRA layers for space='lora'")
    parameters = _factors(found) if space == "lora" else _zeros(found)
    size = sum(parameter.numel() for parameter in parameters)
    if not 1 <= eigenvalues <= size:
        raise ValueError(f"eigenvalues must lie in 1 to {size}, got {eigenvalues}")
    if trace_products != 0 and trace_products < 3:
        raise ValueError(f"trace_products must be 0 or at least 3, got {trace_products}")
    steps = min(size, iterations or max(20, 4 * eigenvalues))
    if steps < eigenvalues:
        raise ValueError(f"iterations must be at least {eigenvalues}, got {iterations}")
    things = _library()
    if not math.isfinite(mean_loss(model, loss_fn, batches)):  # no decomposition takes NaN
        none = [math.nan] * eigenvalues
        vectors = parameters[0].new_full((eigenvalues, size), math.nan)
        return Spectrum(size, none, none, vectors, math.nan, math.nan)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(requiring_gradients(parameters))
        if space == "full":
            pairs = zip(found, parameters, strict=True)
            shifts = {layer.name: constant(D) for layer, D in pairs}
            stack.enter_context(shifted(found, shifts))
        if product == "exact":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # others have no second derivative
        operator = things.HessianOperator(
            nn.ParameterList(parameters),
            [partial(loss_fn, model, batch) for batch in batches],
            lambda _, loss: loss(),
            method="autograd" if product == "exact" else "finite_difference",
        )

        def multiply(v: Tensor) -> Tensor:
            # The library's difference takes a step of fixed size times v, meant for unit vectors.
            norm = v.norm() if product == "finite-difference" else torch.ones_like(v[0])
            if norm == 0:
                return torch.zeros_like(v)
            Hv = operator.matvec(v / norm) * norm
            on_product()
            return Hv.detach()

        counted = things.LambdaOperator(multiply, size, operator.device, operator.dtype)
        found_ones = things.lanczos(
            counted, k=eigenvalues, max_iter=steps, which="LA", seed=seed, reorthogonalize=True
        )
        trace, error = math.nan, math.nan
        if trace_products:
            result = things.trace(counted, num_matvecs=trace_products, seed=seed)
            trace, error = result.estimate, result.stderr
    return Spectrum(
        size,
        found_ones.eigenvalues.tolist(),
        found_ones.residuals.tolist(),
        found_ones.eigenvectors,
        trace,
        error,
    )


def _library() -> Any:
    try:
        import hessian_eigenthings  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(
            "eigenvalues and traces need a library: pip install 'hessian-eigenthings>=1.0.0a5'"
        ) from error
    return hessian_eigenthings


def _factors(layers: Sequence[Layer]) -> list[nn.Parameter]:
    """A and B of every pair, each parameter once."""
    pairs = [pair for layer in layers for pair in layer.pairs]
    factors: list[Any] = [p for pair in pairs for p in (pair.parameter_A, pair.parameter_B)]
    return list({id(factor): factor for factor in factors}.values())


def _zeros(layers: Sequence[Layer]) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device))
        for layer in layers
    ]
