"""Random LoRA pairs, and the error of an operator's result against the reference.

Factors are made from their singular values, so that a test can say how ill-conditioned they are.
Gradients are either consistent, ``G_A = s B^T G_W`` and ``G_B = s G_W A^T`` as back-propagation
gives them, or independent of each other. The consistent ones are the harder: they are small along
a factor's small singular directions, where the pseudo-inverse is large.

``EFLAT_TEST_DEVICE=cuda`` runs the operators there; random numbers and references stay on the CPU.
(``cpu:0`` goes through the same copies without a GPU.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import eflat_ext
from eflat_ext import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device(os.environ.get("EFLAT_TEST_DEVICE", "cpu"))
# The CUDA kernels in place of the CPU's, run thread by thread: see host_cuda.py.
HOST_CUDA = "EFLAT_TEST_KERNELS" in os.environ
cpu_only = pytest.mark.skipif(
    DEVICE.type != "cpu" or HOST_CUDA, reason="about the CPU's kernels, their threads and vectors"
)
SCALINGS = (1.0, 2.0, 0.25, -1.5, 16.0)
RHO = 0.05


class Pair(NamedTuple):
    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float

    def __repr__(self) -> str:
        (r, m), n, dtype = self.A.shape, self.B.shape[0], self.A.dtype
        return f"Pair(n={n}, m={m}, r={r}, {dtype}, scaling={self.scaling})"

    def to(self, dtype: torch.dtype) -> Pair:
        return Pair(*(t.to(dtype) for t in self[:4]), self.scaling)

    def clone(self) -> Pair:
        return Pair(*(t.clone() for t in self[:4]), self.scaling)


def moved(x: Any, device: torch.device | str) -> Any:
    """Return a copy of x with its tensors on another device, of the same strides in storage of the
    same size."""
    if isinstance(x, Tensor):
        storage = x.detach().untyped_storage().clone().to(device=device)
        copy = torch.empty(0, dtype=x.dtype, device=device)
        copy.set_(storage, x.storage_offset(), x.size(), x.stride())
        return copy.requires_grad_(x.requires_grad)
    if isinstance(x, (list, tuple)):
        items = [moved(item, device) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def on_device(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on DEVICE; bring results and arguments written in place back to the CPU."""
    if torch.device("cpu") == DEVICE:
        return function(*arguments)
    copies = moved(arguments, DEVICE)
    result = moved(function(*copies), "cpu")
    for argument, copy in zip(arguments, copies, strict=True):
        if isinstance(argument, (list, Tensor)):
            write_back(argument, moved(copy, "cpu"))
    return result


def write_back(argument: Any, value: Any) -> None:
    if isinstance(argument, list):
        for x, y in zip(argument, value, strict=True):
            write_back(x, y)
    elif isinstance(argument, Tensor) and not same_bits(argument, value):
        argument.copy_(value)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def factor(
    g: torch.Generator, rows: int, columns: int, condition: float = 10.0, rank: int | None = None
) -> Tensor:
    """Return a float64 matrix with singular values from 1 down to ``1 / condition``, then zeros."""
    full = min(rows, columns)
    rank = full if rank is None else min(rank, full)
    left = torch.linalg.qr(normal(g, rows, rank)).Q
    right = torch.linalg.qr(normal(g, columns, rank)).Q
    exponents = torch.linspace(0, 1, rank, dtype=torch.float64) if rank > 1 else torch.zeros(rank)
    return (left * float(condition) ** -exponents) @ right.T


def make_pair(
    seed: int,
    n: int,
    m: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    condition_A: float = 10.0,
    condition_B: float = 10.0,
    scaling: float = 2.0,
    consistent: bool = True,
) -> Pair:
    g = generator(seed)
    A = factor(g, r, m, condition_A).to(dtype)
    B = factor(g, n, r, condition_B).to(dtype)
    if consistent:
        gradient = normal(g, n, m)
        grad_A = scaling * (B.double().T @ gradient)
        grad_B = scaling * (gradient @ A.double().T)
    else:
        grad_A, grad_B = normal(g, r, m), normal(g, n, r)
    return Pair(A, B, grad_A.to(dtype), grad_B.to(dtype), scaling)


def make_pair_on_device(*arguments: Any, **options: Any) -> Pair:
    return moved(make_pair(*arguments, **options), DEVICE)


sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 511, 512, 513, 700]))
ranks = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 64]))
dtypes = st.sampled_from(DTYPES)
sides = st.sampled_from(["B", "A"])
ONTO = ("B", "A", "both")
ontos = st.sampled_from(ONTO)  # of the operators of lists
scopes = st.sampled_from(["layer", "global"])
seeds = st.integers(0, 2**32 - 1)


def pairs(
    dtype: st.SearchStrategy[torch.dtype] = dtypes,
    max_condition: float = 1e3,
    sizes: st.SearchStrategy[int] = sizes,
    ranks: st.SearchStrategy[int] = ranks,
) -> st.SearchStrategy[Pair]:
    """Draw pairs of factors whose condition numbers are 1 to ``max_condition``."""
    conditions = st.floats(0, 1).map(lambda x: max_condition**x)
    return st.builds(
        make_pair,
        seeds,
        sizes,
        sizes,
        ranks,
        dtype,
        conditions,
        conditions,
        st.sampled_from(SCALINGS),
        st.booleans(),
    )


def full_rank_pairs(dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Pair]:
    """Draw pairs whose factors have rank r: n, m >= r."""

    def full_rank_pair(seed: int, n_beyond: int, m_beyond: int, r: int) -> Pair:
        return make_pair(seed, r + n_beyond, r + m_beyond, r, dtype)

    beyond = st.integers(0, 30)
    return st.builds(full_rank_pair, seeds, beyond, beyond, st.integers(1, 12))


def lists(pairs: list[Pair]) -> tuple[list, list, list, list, list]:
    """Return a list of pairs as the arguments of a foreach operator."""
    return tuple(list(column) for column in zip(*pairs, strict=True))


def targets(pairs: list[Pair], onto: str = "B") -> list[Tensor]:
    """Return the perturbed factors: onto both, all A, then all B."""
    return [*(p.A for p in pairs if onto != "B"), *(p.B for p in pairs if onto != "A")]


def averages(pairs: list[Pair], onto: str = "B") -> list[Tensor]:
    """Return moving averages of the pairs' perturbations, as they are before the first step."""
    wide = (torch.float64, torch.float32)
    return [
        torch.zeros(t.shape, dtype=wide[t.dtype != wide[0]], device=t.device)
        for t in targets(pairs, onto)
    ]


ADDED = ("average", "own", "strided", "zeros", "nothing")


def added(ema: list[Tensor], kind: str, seed: int, size: float = 0.1) -> list[Tensor]:
    """Return what a forward pass may have added to the perturbed factors: the averages themselves,
    tensors of its own, strided ones or expanded zeros, or nothing."""
    g = generator(seed)
    if kind == "nothing":
        return []
    if kind == "average":
        return list(ema)
    if kind == "zeros":
        return [torch.zeros((), dtype=t.dtype).expand(t.shape) for t in ema]
    E = [(size * normal(g, *t.shape)).to(t.dtype) for t in ema]
    return E if kind == "own" else [t.T.contiguous().T for t in E]


def points(pairs: list[Pair], E: list[Tensor], onto: str) -> list[Pair]:
    """Return the pairs at the point where their gradients were taken."""
    result = list(pairs)
    for i, e in enumerate(E):
        at, name = (
            i % len(pairs),
            "A" if onto == "A" or (onto, i < len(pairs)) == ("both", True) else "B",
        )
        factor = getattr(result[at], name)
        result[at] = result[at]._replace(**{name: (factor + e).to(factor.dtype)})
    return result


def ambiguous(
    pair: Pair, rtol: float | None = None, onto: str = "B", rho: float | None = None
) -> bool:
    """Return whether rounding decides the reference's own answer: a singular value within 5 % of a
    cutoff (either rank is right), or two terms of equation (1) that nearly cancel. Onto both: a
    gradient of B nearly within B's column space, or a product of the two E within 1 % of its limit
    (see :func:`product_share`)."""
    rtol = reference.default_rtol(pair.A, pair.B) if rtol is None else rtol
    for t in (pair.A, pair.B):
        values = torch.linalg.svdvals(t.double())
        if bool(((values / (rtol * values[0])).sub(1).abs() < 0.05).any()):
            return True
    if onto == "both":
        whole, beside, _ = tangent_terms(pair, rtol)
        if 0 < float(beside.norm()) < 0.03 * float(whole.norm()):
            return True
        return abs(product_share(pair, RHO if rho is None else rho, rtol) - 1) < 0.01
    term_A = pair.grad_B.double() @ torch.linalg.pinv(pair.A.T.double(), rtol=rtol)
    term_B = torch.linalg.pinv(pair.B.T.double(), rtol=rtol) @ pair.grad_A.double()
    return bool((term_A + term_B).norm() < 0.03 * (term_A.norm() + term_B.norm()))


def column_space(t: Tensor, rtol: float) -> Tensor:
    """Return an orthonormal basis of the columns of t, float64."""
    left, values, _ = torch.linalg.svd(t.double(), full_matrices=False)
    return left[:, values > rtol * values[0]]


def tangent_terms(pair: Pair, rtol: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return three projections of ``s G`` that the gradients give, float64: ``s G A^+ A``, its
    part outside B's column space (exactly zero where that is everything), and ``B B^+ s G``."""
    rtol = reference.default_rtol(pair.A, pair.B) if rtol is None else rtol
    A, B, grad_A, grad_B = (t.double() for t in pair[:4])
    columns = column_space(B, rtol)
    whole = grad_B @ torch.linalg.pinv(A.T, rtol=rtol)
    beside = whole - columns @ (columns.T @ whole)
    if columns.shape[0] == columns.shape[1]:
        beside = torch.zeros_like(beside)
    return whole, beside, torch.linalg.pinv(B.T, rtol=rtol) @ grad_A


def product_share(pair: Pair, rho: float, rtol: float | None = None) -> float:
    """Return ||s E_B E_A|| over its limit, rho / 2, if both factors are perturbed."""
    rtol = reference.default_rtol(pair.A, pair.B) if rtol is None else rtol
    _, beside, of_A = tangent_terms(pair, rtol)
    size = float((beside.square().sum() + of_A.square().sum()).sqrt())
    if size == 0:
        return 0.0
    E_B = beside / size @ torch.linalg.pinv(pair.A.double(), rtol=rtol)
    E_A = torch.linalg.pinv(pair.B.double(), rtol=rtol) @ (of_A / size)
    return 2 * rho / abs(pair.scaling) * float((E_B @ E_A).norm())


def with_small_B(pair: Pair, scale: float = 2.0**-10) -> Pair:
    """Return the pair with a smaller B and the gradient of A that goes with it."""
    return pair._replace(B=pair.B * scale, grad_A=pair.grad_A * scale)


def floors(
    pairs: list[Pair], onto: str, rho: float, scope_norms: Tensor, rtol: float | None = None
) -> list[float]:
    """Return the floors of :func:`error` for each perturbation: zero, but for E_B onto both where B
    spans all columns and its gradient has nothing outside them but rounding."""
    if onto != "both":
        return [0.0] * len(pairs)
    of_B = []
    for pair, norm in zip(pairs, scope_norms.tolist(), strict=True):
        cutoff = reference.default_rtol(pair.A, pair.B) if rtol is None else rtol
        whole, beside, _ = tangent_terms(pair, cutoff)
        E_B = whole @ torch.linalg.pinv(pair.A.double(), rtol=cutoff)
        size = rho / pair.scaling**2 * float(E_B.norm())
        of_B.append(size / norm if not beside.any() and 0 < norm < torch.inf else 0.0)
    return [0.0] * len(pairs) + of_B


def error(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the relative error in the Frobenius norm; the absolute one where zero is expected."""
    size = max(float(expected.double().norm()), floor)
    return float((value.double() - expected.double()).norm()) / (size if size > 0 else 1.0)


def rounding_errors(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the largest elementwise error in units of ``value``'s half step there, after an
    allowance of 1e-6 of the largest element for the arithmetic itself."""
    info = torch.finfo(value.dtype)
    half_step = torch.maximum(
        expected.abs() * info.eps / 2, torch.tensor(info.smallest_normal * info.eps / 2)
    )
    largest = max(float(expected.abs().max()), floor)
    return float(((value.double() - expected).abs() / (half_step + 1e-6 * largest)).max())


def poison(*tensors: Tensor) -> None:
    """Leave NaN in memory that the allocator is likely to hand out next for such tensors."""
    for t in tensors:
        held = [torch.full(t.shape, torch.nan, dtype=t.dtype, device=DEVICE) for _ in range(3)]
        del held


def perturb(
    pair: Pair, rho: float = RHO, onto: str = "B", rtol: float | None = None
) -> tuple[Tensor, Tensor]:
    poison(pair.B if onto == "B" else pair.A)
    E, norm = on_device(eflat_ext.perturb, *pair, rho, onto, rtol)
    target = pair.B if onto == "B" else pair.A
    assert E.shape == target.shape and E.dtype == target.dtype and E.is_contiguous()
    assert norm.shape == ()
    assert norm.dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32)
    assert bool(E.isfinite().all())
    return E, norm


def perturbations(
    pair: Pair, rho: float = RHO, onto: str = "B", rtol: float | None = None
) -> tuple[list[Tensor], Tensor]:
    """Call :func:`perturb`, or its foreach form onto both."""
    if onto != "both":
        E, norm = perturb(pair, rho, onto, rtol)
        return [E], norm
    both, norms = foreach_perturb([pair], rho, onto, "layer", rtol)
    return both, norms[0]


def expected_perturbations(
    pair: Pair, rho: float = RHO, onto: str = "B", rtol: float | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return the reference's :func:`perturbations`."""
    E, norms = reference.foreach_perturb(*lists([pair]), rho, onto, "layer", rtol)
    return E, norms[0]


def foreach_perturb(
    pairs: list[Pair],
    rho: float = RHO,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    like = targets(pairs, onto)
    poison(*like)
    E, norms = on_device(eflat_ext.foreach_perturb, *lists(pairs), rho, onto, norm_scope, rtol)
    assert norms.shape == (len(pairs),)
    assert [(e.shape, e.dtype) for e in E] == [(t.shape, t.dtype) for t in like]
    assert all(e.is_contiguous() and bool(e.isfinite().all()) for e in E)
    return E, norms


def perturb_ema_(
    pairs: list[Pair],
    ema: list[Tensor],
    skipped: Tensor,
    beta: float = 0.9,
    onto: str = "B",
    norm_scope: str = "layer",
    E: Sequence[Tensor] = (),
) -> Tensor:
    """Call the operator in place on ``ema`` and ``skipped``; return the norms."""
    *columns, scaling = lists(pairs)
    arguments = (*columns, list(E), ema, skipped, scaling, RHO, beta, onto, norm_scope)
    return on_device(torch.ops.eflat.foreach_perturb_ema_, *arguments)


def all_near(
    E: Sequence[Tensor],
    expected: Sequence[Tensor],
    least: Sequence[float],
    bound: float,
    *,
    float64: float | None = None,
    roundings: float = 1.001,
) -> bool:
    """Return whether perturbations are the expected ones: within a relative error (that of float64
    may be another), and those of 16-bit types within so many half steps.

    Args:
        least: the sizes below which errors count as absolute, see :func:`floors`.
    """
    for e, x, floor in zip(E, expected, least, strict=True):
        if e.dtype.itemsize == 2:
            if rounding_errors(e, x, floor) > roundings:
                return False
        elif error(e, x, floor) > (float64 if float64 and e.dtype == torch.float64 else bound):
            return False
    return True


def all_same_bits(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether two lists hold the same tensors, bit for bit."""
    return all(same_bits(x, y) for x, y in zip(tensors, others, strict=True))


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether every bit is equal; NaNs of equal bits are equal."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = x.contiguous(), y.contiguous()
    return bool((x.reshape(-1).view(torch.uint8) == y.reshape(-1).view(torch.uint8)).all())
