"""Compute slices of the loss around a minimum, in the full space of the adapted layers.

A direction maps the names of layers to shifts of their whole weights. A slice is the loss along one
direction, or on the grid that two directions span. Weights keep their bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .full_space import Layer, LossFn, Shift, adapted_layers, check_batches, constant, mean_loss
from .hessian import Product, hessian

Direction = Mapping[str, Shift]


def random_direction(layers: Sequence[Layer], seed: int = 0) -> dict[str, Shift]:
    """Return a Gaussian direction whose rows have the norms of the weight's rows.

    This is the filter normalisation of Li et al., 2018 (arXiv 1712.09913), by which slices of
    models whose weights differ in scale can be compared. Models with layers of the same shapes get
    the same Gaussian numbers from the same seed.

    Args:
        layers: From :func:`eflat_ext.full_space.adapted_layers`.
        seed: Seed of the Gaussian numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    direction: dict[str, Shift] = {}
    for layer in layers:
        noise = torch.randn(layer.shape, generator=generator, dtype=layer.dtype)
        rows = torch.linalg.vector_norm(layer.weight(), dim=1, keepdim=True).cpu()
        noise *= rows / torch.linalg.vector_norm(noise, dim=1, keepdim=True)
        direction[layer.name] = partial(_on, noise, layer.device)
    return direction


def hessian_directions(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    count: int = 2,
    *,
    layers: Sequence[str] | None = None,
    product: Product = "exact",
    seed: int = 0,
    on_product: Callable[[], None] = lambda: None,
) -> list[dict[str, Shift]]:
    """Return the Hessian's eigenvectors of largest eigenvalue, each of norm 1 over all layers.

    Args:
        count: Number of eigenvectors.
        model, loss_fn, batches, layers, product, seed, on_product: As for
            :func:`eflat_ext.hessian.hessian`, which raises the same errors.
    """
    spectrum = hessian(
        model,
        loss_fn,
        batches,
        eigenvalues=count,
        trace_products=0,
        product=product,
        seed=seed,
        layers=layers,
        on_product=on_product,
    )
    found = adapted_layers(model, layers)
    sizes = [layer.shape[0] * layer.shape[1] for layer in found]
    directions: list[dict[str, Shift]] = []
    for vector in spectrum.vectors:
        vector = vector / vector.norm()
        pieces = zip(found, vector.split(sizes), strict=True)
        directions.append(
            {layer.name: partial(torch.reshape, piece, layer.shape) for layer, piece in pieces}
        )
    return directions


def slice_1d(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    direction: Direction,
    xs: Sequence[float],
    *,
    layers: Sequence[str] | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the loss at ``W + x D`` for each x.

    Args:
        model, loss_fn, batches, layers: As for :func:`eflat_ext.sharpness.worst_case`, which
            raises the same errors.
        direction: D, shifts by the name of the layer.
        xs: The coordinates.
        on_point: Called after each point.
    """
    grid = slice_2d(
        model, loss_fn, batches, (direction, {}), xs, [0.0], layers=layers, on_point=on_point
    )
    return grid[0]


def slice_2d(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    directions: tuple[Direction, Direction],
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    layers: Sequence[str] | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Return the loss at ``W + x D1 + y D2``, one list for each y with one number for each x.

    Args:
        directions: D1 and D2.
        xs, ys: The coordinates.
        model, loss_fn, batches, layers, on_point: As for :func:`slice_1d`.
    """
    found = adapted_layers(model, layers)
    rows = []
    for y in ys:
        row = []
        for x in xs:
            shifts = {
                name: partial(_combination, [(x, directions[0]), (y, directions[1])], name)
                for name in {**directions[0], **directions[1]}
            }
            row.append(mean_loss(model, loss_fn, batches, found, shifts))
            on_point()
        rows.append(row)
    return rows


def line(
    model: nn.Module,
    other: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    xs: Sequence[float],
    *,
    layers: Sequence[str] | None = None,
    on_point: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the loss on the line from ``model`` (x = 0) to ``other`` (x = 1).

    Both are fine-tuned from one base. The whole weights of the adapted layers are interpolated, and
    so are all other floating-point parameters and buffers in which the models differ, such as a
    classification head or the statistics of a batch norm.

    Args:
        model, other: Models with adapters on the same layers; ranks may differ.
        loss_fn, batches, layers, on_point: As for :func:`slice_1d`.
        xs: The coordinates.

    Raises:
        ValueError: The models differ in their adapted layers, in the names of their parameters and
            buffers, or in the shapes of those outside the adapted layers.
    """
    found, others = adapted_layers(model, layers), adapted_layers(other, layers)
    if [(x.name, x.shape) for x in found] != [(x.name, x.shape) for x in others]:
        raise ValueError("other must have adapters on the same layers as model")
    theirs = {name: value.detach() for name, value in _state(other)}
    if {name for name, _ in _state(model)} != theirs.keys():
        raise ValueError("other must have the same parameters and buffers as model")
    for name, p in _outside(model, found).items():
        if (shape := theirs[name].shape) != p.shape:
            raise ValueError(
                f"{name} of other must have shape {tuple(p.shape)}, got {tuple(shape)}"
            )
    check_batches(batches)
    direction: dict[str, Shift] = {}
    for first, second in zip(found, others, strict=True):
        D = second.weight().to(first.device) - first.weight()
        direction[first.name] = constant(D)
    losses = []
    for x in xs:
        with _blended(model, theirs, x, found):
            losses += slice_1d(model, loss_fn, batches, direction, [x], layers=layers)
        on_point()
    return losses


# --- helpers -----------------------------------------------------------------------------


def _on(D: Tensor, device: torch.device) -> Tensor:
    return D.to(device)


def _combination(terms: Sequence[tuple[float, Direction]], name: str) -> Tensor:
    parts = [x * direction[name]() for x, direction in terms if name in direction]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return the parameters and buffers with their names."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _outside(model: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return the floating-point parameters and buffers outside the layers' weights and factors."""
    pairs = [pair for layer in layers for pair in layer.pairs]
    factors = [p for pair in pairs for p in (pair.parameter_A, pair.parameter_B)]
    weights = [getattr(layer.module, "weight", None) for layer in layers]
    inside = {id(p) for p in (*factors, *weights)}
    return {name: p for name, p in _state(model) if id(p) not in inside and p.is_floating_point()}


@contextmanager
def _blended(
    model: nn.Module, theirs: Mapping[str, Tensor], x: float, layers: Sequence[Layer]
) -> Iterator[None]:
    """Interpolate everything outside the layers within the context: x = 0 is the model's value."""
    moving = [
        (p, theirs[name].to(p))
        for name, p in _outside(model, layers).items()
        if not torch.equal(p, theirs[name].to(p))
    ]
    copies = [p.detach().clone() for p, _ in moving]
    try:
        with torch.no_grad():
            for p, q in moving:
                p.lerp_(q, x)
        yield
    finally:
        with torch.no_grad():
            for (p, _), copy in zip(moving, copies, strict=True):
                p.copy_(copy)
