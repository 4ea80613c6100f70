"""Compute the largest eigenvalues and the trace of the Hessian, with hessian-eigenthings.

Eigenvalues come from the Lanczos method, the trace from Hutch++ (Meyer et al., 2021).
"""

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
    """Largest eigenvalues and trace of a Hessian, returned by :func:`hessian`.

    Attributes:
        size: N, the number of weights.
        eigenvalues: The k largest eigenvalues, in descending order.
        residuals: ``||H v - lambda v||`` of each eigenvalue.
        vectors: Eigenvectors, (k, N). A row holds the flattened (n, m) shifts of the layers one
            after another with ``space="full"``, and A and B of each pair with ``space="lora"``.
        trace: Trace of the Hessian; NaN if ``trace_products`` was 0.
        trace_standard_error: Standard error of the trace; NaN with fewer than 6 products.
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
    """Compute the largest eigenvalues and the trace of the Hessian of the mean loss, in eval mode.

    Memory is one vector of N numbers for each Lanczos iteration, then one for every three products
    of the trace. Every result is NaN if the loss is not finite.

    Args:
        model, loss_fn, batches, layers: As for :func:`eflat_ext.sharpness.worst_case`.
        space: "full" for the whole weights of the adapted layers, "lora" for their factors A and B.
        eigenvalues: Number of eigenvalues, 1 to N.
        iterations: Number of Lanczos iterations; by default four for each eigenvalue, at least 20.
        trace_products: Number of Hessian-vector products for the trace, at least 3; 0 to skip it.
        product: "exact" differentiates twice and runs attention by torch's math kernel, the only
            one with second derivatives; "finite-difference" takes two gradients, works with every
            kernel, and is accurate to about four digits in float32.
        seed: Seed of the start vector and of the trace's samples.
        on_product: Called after each product.

    Raises:
        ImportError: hessian-eigenthings is not installed.
        ValueError: An argument is out of its range, or no layer is left.
        TypeError: ``batches`` has no length, or ``layers`` is a string.
        NotImplementedError: The weight of a layer cannot be shifted.
    """
    check_batches(batches)
    if space not in ("full", "lora"):
        raise ValueError(f"space must be 'full' or 'lora', got {space!r}")
    if product not in ("exact", "finite-difference"):
        raise ValueError(f"product must be 'exact' or 'finite-difference', got {product!r}")
    found = adapted_layers(model, layers)
    if space == "lora" and not all(layer.pairs for layer in found):
        raise ValueError("model must have LoRA layers for space='lora', got none")
    parameters = _factors(found) if space == "lora" else _zeros(found)
    size = sum(parameter.numel() for parameter in parameters)
    if not 1 <= eigenvalues <= size:
        raise ValueError(f"eigenvalues must be 1 to {size}, got {eigenvalues}")
    if trace_products != 0 and trace_products < 3:
        raise ValueError(f"trace_products must be 0 or at least 3, got {trace_products}")
    steps = min(size, iterations or max(20, 4 * eigenvalues))
    if steps < eigenvalues:
        raise ValueError(f"iterations must be at least {eigenvalues}, got {iterations}")
    things = _library()
    if not math.isfinite(mean_loss(model, loss_fn, batches)):  # the decompositions raise on NaN
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
            # The library's finite difference takes a step of fixed size for a v of norm 1.
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
    """Return A and B of every pair, tied parameters once."""
    pairs = [pair for layer in layers for pair in layer.pairs]
    factors: list[Any] = [p for pair in pairs for p in (pair.parameter_A, pair.parameter_B)]
    return list({id(factor): factor for factor in factors}.values())


def _zeros(layers: Sequence[Layer]) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device))
        for layer in layers
    ]
