"""Perturbations of both factors, against orthogonal projectors and the gradient of W itself. The
reference is tested here as well."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from adamw_case import copied, mapped, on_meta, random_call
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    RHO,
    Pair,
    all_near,
    all_same_bits,
    ambiguous,
    averages,
    dtypes,
    error,
    factor,
    floors,
    foreach_perturb,
    full_rank_pairs,
    generator,
    lists,
    make_pair,
    normal,
    pairs,
    perturb_ema_,
    perturbations,
    product_share,
    rounding_errors,
    same_bits,
    scopes,
    seeds,
    with_small_B,
)
from test_operators import check
from torch import Tensor

import eflat_ext
from eflat_ext import reference

ops = torch.ops.eflat


def of_operator(pair: Pair, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    (E_A, E_B), norm = perturbations(pair, rho, "both")
    return E_A, E_B, norm


def of_reference(pair: Pair, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    return reference.tangent(*pair, rho)


every_source = pytest.mark.parametrize("perturbed", [of_operator, of_reference])


class Layer(NamedTuple):
    """A pair with the gradient of W that its factors' gradients come from."""

    pair: Pair
    gradient: Tensor


def make_layer(seed: int, n: int, m: int, r: int, scaling: float) -> Layer:
    g = generator(seed)
    A, B, gradient = factor(g, r, m), factor(g, n, r), normal(g, n, m)
    pair = Pair(A, B, scaling * B.T @ gradient, scaling * gradient @ A.T, scaling)
    return Layer(pair, gradient)


beyond = st.integers(0, 20)
layers = st.builds(
    lambda seed, n, m, r, scaling: make_layer(seed, r + n, r + m, r, scaling),
    *(seeds, beyond, beyond, st.integers(1, 10), st.sampled_from([1.0, 2.0, 0.25, -1.5])),
)


def projections(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the gradient's projections on the tangent space, and on the rows of A alone."""
    A, B, G = layer.pair.A, layer.pair.B, layer.gradient
    rows, columns = torch.linalg.qr(A.T).Q, torch.linalg.qr(B).Q
    without_columns = G - columns @ (columns.T @ G)
    return G - (without_columns - without_columns @ rows @ rows.T), G @ rows @ rows.T


def first_order(pair: Pair, E_A: Tensor, E_B: Tensor) -> Tensor:
    return pair.scaling * (E_B @ pair.A + pair.B @ E_A)


# The tangent space.


@every_source
@given(layers, st.floats(0.01, 0.98))
def test_W_moves_along_the_projection_on_the_tangent_space(perturbed, layer, share):
    pair = layer.pair
    rho = min(share / max(product_share(pair, 1.0), 1e-9), 10.0)
    E_A, E_B, norm = perturbed(pair, rho)
    P, _ = projections(layer)
    assert error(norm, P.norm()) <= 1e-9
    moved = first_order(pair, E_A, E_B)
    assert float(moved.norm()) == pytest.approx(rho, rel=1e-9)
    assert error(moved, rho * P / P.norm()) <= 1e-9
    # The two terms are orthogonal, and what else W moves by is at most half of rho.
    assert float((pair.B.T @ E_B).norm()) <= 1e-9 * rho / abs(pair.scaling)
    assert float((pair.scaling * E_B @ E_A).norm()) <= rho / 2
    whole = pair.scaling * ((pair.B + E_B) @ (pair.A + E_A) - pair.B @ pair.A)
    assert float(whole.norm()) <= 1.5 * rho


@every_source
@given(layers, st.floats(1.02, 1e6))
def test_B_alone_moves_along_its_own_projection(perturbed, layer, share):
    pair = layer.pair
    most = product_share(pair, 1.0)
    assume(most > 1e-9)
    rho = share / most
    E_A, E_B, norm = perturbed(pair, rho)
    _, P = projections(layer)
    assert not E_A.any()
    assert error(norm, P.norm()) <= 1e-9
    assert error(pair.scaling * E_B @ pair.A, rho * P / P.norm()) <= 1e-9


@given(seeds, dtypes, st.sampled_from([1.0, 2.0**-6, 2.0**-12]), st.booleans())
def test_where_B_alone_begins(seed, dtype, scale, consistent):
    pair = make_pair(seed, 20, 30, 4, dtype, scaling=0.5, consistent=consistent)
    pair = with_small_B(pair, scale)
    limit = 1 / product_share(pair, 1.0)
    assume(limit < 100)  # or E does not fit float16
    for share, alone in ((0.5, False), (0.99, False), (1.01, True), (2.0, True)):
        E_A, E_B, _ = of_operator(pair, share * limit)
        assert bool(E_A.any()) != alone and bool(E_B.any())
        expected = reference.tangent(*pair, share * limit)
        assert bool(expected[0].any()) != alone


@given(full_rank_pairs(), seeds, st.sampled_from([1.0, 1e-3]))
def test_perturbation_belongs_to_W_not_to_its_factors(pair, seed, scale):
    pair = with_small_B(pair, scale)
    assume(not ambiguous(pair, None, "both"))
    r = pair.A.shape[0]
    R = normal(generator(seed), r, r) / r + 2 * torch.eye(r, dtype=torch.float64)
    other = Pair(
        torch.linalg.solve(R, pair.A),
        pair.B @ R,
        R.T @ pair.grad_A,
        torch.linalg.solve(R, pair.grad_B.T).T,
        pair.scaling,
    )
    E_A, E_B, norm = of_operator(pair, RHO)
    other_A, other_B, other_norm = of_operator(other, RHO)
    assert error(other_norm, norm) <= 1e-9
    assert bool(other_A.any()) == bool(E_A.any())
    assert error(first_order(other, other_A, other_B), first_order(pair, E_A, E_B)) <= 1e-8
    assert error(other_B @ other_A, E_B @ E_A) <= 1e-8 or not bool(E_A.any())


@given(pairs(st.sampled_from([torch.float64, torch.float32]), max_condition=1e3), st.floats(-6, 1))
def test_B_of_any_size(pair, exponent):
    small = with_small_B(pair, 10.0**exponent)
    assume(not ambiguous(small, None, "both"))
    check(small, "both", 1e-6 if pair.A.dtype == torch.float32 else 1e-10)


@given(pairs(dtypes, max_condition=30), st.floats(-3, 3))
def test_any_radius(pair, exponent):
    rho = 10.0**exponent
    assume(not ambiguous(pair, None, "both", rho))
    expected = reference.tangent(*pair, rho)
    assume(max(float(x.norm()) for x in expected[:2]) < torch.finfo(pair.A.dtype).max)
    E_A, E_B, norm = of_operator(pair, rho)
    assert error(norm, expected[2]) <= 1e-6
    least = floors([pair], "both", rho, expected[2].reshape(1))
    assert all_near((E_A, E_B), expected[:2], least, 1e-6, roundings=1.01)


# B with all columns (n <= r): nothing is left of its gradient, however ill-conditioned A is.


@every_source
@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("condition_A, condition_B", [(1, 1), (1e2, 10), (1e3, 1e2), (1e5, 1e4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_B_with_all_columns_leaves_it_to_A(perturbed, dtype, condition_A, condition_B, consistent):
    for seed in torch.randint(2**31, (10,)).tolist():
        for n, m, r in ((3, 60, 3), (2, 9, 5), (1, 5, 1), (12, 20, 16)):
            conditions = (float(condition_A), float(condition_B))
            pair = make_pair(seed, n, m, r, dtype, *conditions, consistent=consistent)
            E_A, E_B, norm = perturbed(pair, RHO)
            A, B, grad_A, s = pair.A.double(), pair.B.double(), pair.grad_A.double(), pair.scaling
            inverse = torch.linalg.pinv(B, rtol=1e-12)
            P = inverse.T @ grad_A / s
            assert error(norm, P.norm()) <= 1e-6
            assert error(E_A, RHO / s * inverse @ (P / P.norm())) <= 1e-6
            assert float((s * E_B.double() @ A).norm()) <= 1e-6 * RHO


@every_source
def test_gradient_of_A_zero_beside_B_with_all_columns(perturbed):
    # Nothing of the gradient is in the tangent space but rounding, which has no direction.
    for dtype in (torch.float64, torch.float32):
        for seed in torch.randint(2**31, (20,)).tolist():
            pair = make_pair(seed, 3, 30, 4, dtype)
            pair = pair._replace(grad_A=torch.zeros_like(pair.grad_A))
            E_A, E_B, norm = perturbed(pair, RHO)
            assert float(norm) == 0
            if perturbed is of_operator:
                assert not E_A.any() and not E_B.any()


# Sizes at the ends of the types.


@pytest.mark.parametrize("power", [-330, -250, 250, 330])
@pytest.mark.parametrize("scale", [1.0, 2.0**-10])
def test_the_size_of_float64_gradients_decides_nothing(scale, power):
    # Fourth powers of such gradients are beyond float64.
    pair = with_small_B(make_pair(int(torch.randint(99, ())), 30, 20, 4, torch.float64), scale)
    size = 2.0**power
    scaled = pair._replace(grad_A=pair.grad_A * size, grad_B=pair.grad_B * size)
    E_A, E_B, norm = of_operator(scaled, RHO)
    expected_A, expected_B, expected_norm = of_operator(pair, RHO)
    assert bool(E_A.any()) == (scale == 1)
    assert error(E_A, expected_A) <= 1e-10 and error(E_B, expected_B) <= 1e-10
    assert error(norm / size, expected_norm) <= 1e-10


def large_in(name: str, seed: int) -> Pair:
    """A pair of float16 of which one E is far larger than the other, and the product is small."""
    if name == "A":  # B has all columns
        return make_pair(seed, 4, 30, 4, torch.float16)
    pair = make_pair(seed, 20, 30, 4, torch.float16)
    return pair._replace(B=pair.B * 2.0**8, grad_A=pair.grad_A * 2.0**-8)


def largest_radius(pair: Pair) -> float:
    """Return the radius at which the larger E reaches the largest float16."""
    small = 1e-3
    assert product_share(pair, small) < 0.5
    limit = 65504 * small / max(float(x.norm()) for x in reference.tangent(*pair, small)[:2])
    assume(product_share(pair, limit) < 0.4)
    return limit


@pytest.mark.parametrize("name", ["A", "B"])
@given(seed=seeds)
def test_float16_overflow_of_either_counts_as_an_infinite_norm(name, seed):
    pair = large_in(name, seed)
    limit = largest_radius(pair)
    E_A, E_B, norm = of_operator(pair, 0.999 * limit)
    expected = reference.tangent(*pair, 0.999 * limit)
    assert norm.isfinite()
    least = floors([pair], "both", 0.999 * limit, expected[2].reshape(1))
    assert all_near((E_A, E_B), expected[:2], least, 0.0)
    assert bool(E_A.any()) and (name == "A" or bool(E_B.any()))
    E_A, E_B, norm = of_operator(pair, 1.001 * limit)
    assert norm == math.inf and not E_A.any() and not E_B.any()


@given(seeds, st.sampled_from("AB"), scopes)
def test_float16_overflow_leaves_out_both_and_spoils_no_other(seed, name, scope):
    bad = large_in(name, seed)
    good = make_pair(seed + 1, 20, 30, 4, torch.float16)
    good = good._replace(A=good.A * 2.0**8, B=good.B * 2.0**8)  # E is small
    rho = 1.5 * largest_radius(bad)
    if scope == "global":  # of which bad has a part
        _, norms = foreach_perturb([good, bad], 0.0, "both")
        rho /= float(norms[1]) / float(norms.norm())
    E, norms = foreach_perturb([good, bad, good], rho, "both", scope)
    assert norms[1] == math.inf and not E[1].any() and not E[4].any()
    alone, alone_norms = foreach_perturb([good, good], rho, "both", scope)
    assert bool((alone_norms < math.inf).all()) and bool(alone[2].any())
    assert all(map(same_bits, [E[0], E[2], E[3], E[5]], alone))


# Lists.


@given(st.lists(pairs(dtypes, max_condition=50), min_size=1, max_size=6), seeds)
def test_the_global_norm_does_not_change_which_factors_move(listed, seed):
    listed = [with_small_B(p, 2.0 ** -(10 * (seed >> i & 1))) for i, p in enumerate(listed)]
    E, norms = foreach_perturb(listed, RHO, "both", "layer")
    E_global, same_norms = foreach_perturb(listed, RHO, "both", "global")
    assert same_bits(norms, same_norms)
    for i, (e, of_all) in enumerate(zip(E, E_global, strict=True)):
        share = float(norms[i % len(listed)] / norms.norm())
        if e.dtype.itemsize == 2:
            assert rounding_errors(of_all, share * e.double()) <= 2.1  # each is rounded
        else:
            assert error(of_all, share * e.double()) <= 1e-6


@given(st.lists(pairs(), min_size=1, max_size=4), scopes)
def test_all_A_come_before_all_B(listed, scope):
    E, _ = foreach_perturb(listed, RHO, "both", scope)
    assert [e.shape for e in E] == [p.A.shape for p in listed] + [p.B.shape for p in listed]
    means = averages(listed, "both")
    perturb_ema_(listed, means, torch.tensor(0), 1.0, "both", scope)
    for mean, e in zip(means, E, strict=True):
        if e.dtype.itemsize == 2:
            assert rounding_errors(e, mean.double()) <= 1.01
        else:
            assert same_bits(e, mean)


# Wrong calls.


def two_pairs() -> list[Pair]:
    return [make_pair(0, 9, 11, 3), make_pair(1, 5, 6, 2)]


def average_call() -> dict:
    columns = dict(zip(Pair._fields, lists(two_pairs()), strict=True))
    options = {"skipped": torch.tensor(7), "rho": RHO, "beta": 0.9, "onto": "both"}
    ema = averages(two_pairs(), "both")
    return {**columns, "E": [t.clone() for t in ema], "ema": ema, **options}


COUNT = "must have two entries per pair, all A and all B, 4, got"


@pytest.mark.parametrize("name", ["E", "ema"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_numbers_of_averages_and_of_what_was_added(count, name):
    for operator, call in (
        (ops.foreach_perturb_ema_, average_call()),
        (ops.foreach_adamw_step_, random_call(two_pairs(), "both")),
    ):
        before = copied(call)
        call[name] = [t.clone() for t in 2 * call[name]][:count]
        if (name, count) == ("E", 0):  # nothing was added
            operator(**call)
            continue
        with pytest.raises(RuntimeError, match=f"{name} {COUNT} {count}"):
            operator(**call)
        assert all_same_bits(call["A"] + call["B"], before["A"] + before["B"])
        assert int(call["skipped"]) == int(before["skipped"])


@pytest.mark.parametrize(
    "index, value, says",
    [
        (0, lambda t: t.T.contiguous(), r"ema\[0\] must have the shape of A\[0\].*3, 11.*11, 3"),
        (1, lambda t: t[:, 1:].clone(), r"ema\[1\] must have the shape of A\[1\].*2, 6.*2, 5"),
        (2, lambda t: t.T.contiguous(), r"ema\[2\] must have the shape of B\[0\].*9, 3.*3, 9"),
        (3, lambda t: t[1:].clone(), r"ema\[3\] must have the shape of B\[1\].*5, 2.*4, 2"),
        (0, lambda t: t.double(), r"ema\[0\] must be float32"),
        (3, lambda t: t.half(), r"ema\[3\] must be float32"),
    ],
)
@pytest.mark.parametrize("name", ["E", "ema"])
def test_entries_are_named_by_their_place(name, index, value, says):
    says = says.replace("ema", name)
    for operator, call in (
        (ops.foreach_perturb_ema_, average_call()),
        (ops.foreach_adamw_step_, random_call(two_pairs(), "both")),
    ):
        call[name][index] = value(call[name][index])
        before = copied(call)
        with pytest.raises(RuntimeError, match=says):
            operator(**call)
        assert all_same_bits(call["ema"], before["ema"])
        assert int(call["skipped"]) == int(before["skipped"])
        if "shape" in says:
            with pytest.raises(ValueError, match=says):
                operator(**on_meta(call))


@pytest.mark.parametrize("index", range(4))
def test_averages_are_contiguous(index):
    for operator, call in (
        (ops.foreach_perturb_ema_, average_call()),
        (ops.foreach_adamw_step_, random_call(two_pairs(), "both")),
    ):
        call["ema"][index] = call["ema"][index].T.contiguous().T
        with pytest.raises(RuntimeError, match=rf"ema\[{index}\] must be contiguous"):
            operator(**call)


def test_perturb_has_one_E():
    pair = make_pair(0, 9, 11, 3)
    says = "onto must be 'B' or 'A', got 'both', which has two E: see foreach_perturb"
    for given_pair in (pair, Pair(*mapped(pair._asdict(), lambda t: t.to("meta")).values())):
        with pytest.raises(ValueError, match=says):
            eflat_ext.perturb(*given_pair, RHO, "both")
    with pytest.raises(RuntimeError, match=says):
        ops.perturb(*pair, RHO, "both")
