"""Compare EFlat-LoRA's estimate of the full-space gradient with the true gradient, by layer.

With G the true gradient of ``W = W0 + s B A``, the estimates are

    "term A"    G_B (A^T)^+ / s, the projection of G on the row space of A
    "term B"    (B^T)^+ G_A / s, the projection of G on the column space of B
    "mean"      half the sum of both: equation (1) of EFlat-LoRA (arXiv 2508.00522)
    "tangent"   the projection of G on the tangent space of the matrices of rank r: the sum of both
                terms, less the part that they share
    "onto B"    s E_B A, the perturbation of radius 1 along the mean after equation (3)
    "onto A"    s B E_A, the same with the transfer onto A
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eflat_ext.lora import LoraPair
from eflat_ext.ops import perturb
from eflat_ext.ops.checks import check_options
from eflat_ext.reference import default_rtol

from .full_space import MEMORY, LossFn, adapted_layers, gradients

ESTIMATES = ("term A", "term B", "mean", "tangent", "onto B", "onto A")


@dataclass(frozen=True)
class Quality:
    """One estimate of the gradient of one layer, compared with the true gradient G.

    Attributes:
        layer: Name of the layer.
        estimate: One of ``ESTIMATES``.
        rtol: Relative cutoff of the pseudo-inverses.
        cosine: Cosine between the estimate and G. 0 if the estimate is zero; NaN if G is zero, or
            if G or a factor is not finite.
        norm_ratio: Norm of the estimate over ``||G||``; for "onto B" and "onto A" over the radius.
        gradient_norm: ``||G||``, the Frobenius norm.
        top_share: Share of the largest singular value in ``||G||^2``.
    """

    layer: str
    estimate: str
    rtol: float
    cosine: float
    norm_ratio: float
    gradient_norm: float
    top_share: float


def estimate_quality(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    rtols: Sequence[float | None] = (None,),
    layers: Sequence[str] | None = None,
    memory: int = MEMORY,
    on_pass: Callable[[int, int], None] = lambda done, total: None,
) -> list[Quality]:
    """Compare every estimate with the true gradient, in every layer and at every cutoff.

    Args:
        model: A PEFT model with one adapter on each layer.
        loss_fn, batches, layers, memory: As for :func:`eflat_ext.sharpness.worst_case`.
        rtols: Relative cutoffs of the pseudo-inverses; None for the default of the layer's dtype
            and shape.
        on_pass: As for :func:`eflat_ext.full_space.gradients`.

    Returns:
        A row for every layer, cutoff and estimate, in this order.

    Raises:
        ValueError: An argument is out of its range, or a layer has more than one adapter.
        TypeError: ``batches`` has no length, or ``layers`` is a string.
        NotImplementedError: The weight of a layer cannot be shifted.
    """
    for rtol in rtols:
        check_options(0.0, "B", "layer", rtol)
    found = adapted_layers(model, layers)
    for layer in found:
        if len(layer.pairs) != 1:
            raise ValueError(f"model must have one adapter on {layer.name}, got {len(layer.pairs)}")
    pairs = [layer.pairs[0] for layer in found]
    whole, factors = gradients(
        model, loss_fn, batches, found, pairs, memory=memory, on_pass=on_pass
    )
    rows = []
    for layer, pair, (grad_A, grad_B) in zip(found, pairs, factors, strict=True):
        G = whole.pop(layer.name).to(layer.device).double()
        norm = float(G.norm())
        finite = all(bool(x.isfinite().all()) for x in (G, pair.A, pair.B, grad_A, grad_B))
        share = _top_share(G) if finite else math.nan
        for rtol in rtols:
            cutoff = default_rtol(pair.A, pair.B) if rtol is None else rtol
            nothing = dict.fromkeys(ESTIMATES, torch.full_like(G, math.nan))
            estimates = _estimates(pair, grad_A, grad_B, cutoff) if finite else nothing
            for name, X in estimates.items():
                size = float(X.norm())
                inner = float((X * G).sum()) / size if size else 0.0
                ratio = size if name.startswith("onto") else _over(size, norm)
                rows.append(
                    Quality(layer.name, name, cutoff, _over(inner, norm), ratio, norm, share)
                )
    return rows


def mean_over_layers(rows: Sequence[Quality]) -> list[Mapping[str, Any]]:
    """Average cosine, norm ratio and top share over the layers, for each estimate and cutoff.

    Args:
        rows: From :func:`estimate_quality`. Cutoffs are matched by their position in ``rtols``,
            since the default differs between layers.

    Returns:
        A dictionary with the keys estimate, rtol, cosine, norm_ratio and top_share for each
        cutoff and estimate.
    """
    seen: dict[tuple[str, str], int] = {}
    groups: dict[tuple[int, str], list[Quality]] = {}
    for row in rows:
        place = seen[row.layer, row.estimate] = seen.get((row.layer, row.estimate), -1) + 1
        groups.setdefault((place, row.estimate), []).append(row)
    return [
        {
            "estimate": estimate,
            "rtol": statistics.fmean(row.rtol for row in group),
            "cosine": statistics.fmean(row.cosine for row in group),
            "norm_ratio": statistics.fmean(row.norm_ratio for row in group),
            "top_share": statistics.fmean(row.top_share for row in group),
        }
        for (_, estimate), group in groups.items()
    ]


def _estimates(pair: LoraPair, grad_A: Tensor, grad_B: Tensor, rtol: float) -> dict[str, Tensor]:
    """Return the estimates by name, each (n, m) in float64."""
    s = pair.scaling
    A, B = pair.A.detach(), pair.B.detach()
    pinv_At = torch.linalg.pinv(A.double().T, rtol=rtol)
    pinv_Bt = torch.linalg.pinv(B.double().T, rtol=rtol)
    in_rows = grad_B.double() @ pinv_At / s
    in_columns = pinv_Bt @ grad_A.double() / s
    E = {
        onto: perturb(A, B, grad_A.to(A), grad_B.to(B), s, 1.0, onto, rtol)[0].double()
        for onto in ("B", "A")
    }
    return {
        "term A": in_rows,
        "term B": in_columns,
        "mean": (in_rows + in_columns) / 2,
        "tangent": in_rows + in_columns - pinv_Bt @ (B.double().T @ in_rows),
        "onto B": s * E["B"] @ A.double(),
        "onto A": s * B.double() @ E["A"],
    }


def _top_share(G: Tensor) -> float:
    gram = G @ G.T if G.shape[0] <= G.shape[1] else G.T @ G
    total = float(gram.trace())
    return _over(float(torch.linalg.eigvalsh(gram)[-1]), total)


def _over(x: float, y: float) -> float:
    return x / y if y else math.nan
