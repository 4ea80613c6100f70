"""The operators where the equations have no answer, or none that fits the type.

E is finite always. A layer whose norm is zero or not finite, or whose E would not fit its type,
gets E = 0; its moving average stays as it is and is counted; the other layers do not notice.
"""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import (
    DTYPES,
    ONTO,
    RHO,
    Pair,
    all_near,
    all_same_bits,
    ambiguous,
    averages,
    dtypes,
    error,
    expected_perturbations,
    factor,
    floors,
    foreach_perturb,
    generator,
    make_pair,
    normal,
    on_device,
    ontos,
    pairs,
    perturb,
    perturb_ema_,
    perturbations,
    rounding_errors,
    same_bits,
    scopes,
    seeds,
    sides,
)
from torch import Tensor

from eflat_ext import reference

NOT_FINITE = (math.nan, math.inf, -math.inf)
FIELDS = ("A", "B", "grad_A", "grad_B")
inner_sizes = st.integers(1, 30)


def check(pair: Pair, onto: str, rtol: float | None = None) -> None:
    E, norm = perturbations(pair, RHO, onto, rtol)
    expected, expected_norm = expected_perturbations(pair, RHO, onto, rtol)
    bound = 1e-9 if norm.dtype == torch.float64 else 1e-6
    assert error(norm, expected_norm) <= bound
    least = floors([pair], onto, RHO, expected_norm.reshape(1), rtol)
    assert all_near(E, expected, least, bound)


def moves(E: list[Tensor]) -> bool:
    return any(bool(e.any()) for e in E)


def replaced(pair: Pair, name: str, value: float, index: int = 0) -> Pair:
    pair = pair.clone()
    getattr(pair, name).view(-1)[index] = value
    return pair


def zeroed(pair: Pair, *names: str) -> Pair:
    return pair._replace(**{name: torch.zeros_like(getattr(pair, name)) for name in names})


# Zeros and deficient ranks.


@given(pairs(max_condition=20), ontos)
def test_B_zero_leaves_the_first_term(pair, onto):
    start = zeroed(pair, "B", "grad_A")  # G_A = s B^T G_W = 0 too
    check(start, onto)
    E, norm = perturbations(start, RHO, onto)
    assert norm > 0
    assert [bool(e.any()) for e in E] == {"A": [False], "B": [True], "both": [False, True]}[onto]
    check(zeroed(pair, "B"), onto)
    check(zeroed(pair, "A"), onto)


@given(pairs(), ontos, st.sampled_from([("A", "B"), ("grad_A", "grad_B"), ("A", "grad_A", "B")]))
def test_all_zero_gives_zero(pair, onto, names):
    E, norm = perturbations(zeroed(pair, *names), RHO, onto)
    assert norm == 0 and not moves(E)


@given(seeds, inner_sizes, inner_sizes, st.integers(2, 12), dtypes, ontos)
def test_factors_of_exactly_deficient_rank(seed, n, m, r, dtype, onto):
    # Repeated and zero rows and columns: the rank is exact in every type.
    pair = make_pair(seed, n, m, r, dtype)
    half = r // 2
    A, B = pair.A.clone(), pair.B.clone()
    A[:half] = A[half : 2 * half]
    B[:, 0] = 0
    if r > 2:
        B[:, 1] = 2 * B[:, 2]
    deficient = pair._replace(A=A, B=B)
    assume(not ambiguous(deficient, None, onto))
    check(deficient, onto)


@given(seeds, st.sampled_from([(30, 20, 6), (6, 40, 6), (9, 5, 16)]), ontos)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [0.5, 0.94, 1.06, 2.0])
def test_singular_values_near_the_cutoff(dtype, distance, seed, shape, onto):
    # All singular values but the largest are the same, just below or just above the cutoff.
    n, m, r = shape
    rtol = 1e-3

    def near(rows, columns):
        g = generator(seed + rows)
        size = min(rows, columns)
        values = torch.full((size,), distance * rtol, dtype=torch.float64)
        values[0] = 1
        left, right = (torch.linalg.qr(normal(g, k, size)).Q for k in (rows, columns))
        return (left * values @ right.T).to(dtype)

    g = generator(seed)
    pair = Pair(near(r, m), near(n, r), normal(g, r, m).to(dtype), normal(g, n, r).to(dtype), 2.0)
    # The decision between both and B alone is another one, and looked at elsewhere.
    assume(onto != "both" or not ambiguous(pair, rtol, onto))
    check(pair, onto, rtol)
    # The direction is dropped or kept as a whole: without it the norm is of another size.
    _, norm = perturbations(pair, RHO, onto, rtol)
    _, norm_without = perturbations(pair, RHO, onto, 0.5)
    assert (norm > 30 * norm_without) == (distance > 1)


@given(seeds, ontos)
def test_factor_after_one_adam_step(seed, onto):
    # Every entry of B is about the learning rate, of either sign: ratios of singular values of 1e-4
    # to 1e-8 between the sign pattern's rank and the rest.
    g = generator(seed)
    A = normal(g, 8, 96) / 96**0.5
    gradient = normal(g, 80, 1) @ normal(g, 1, 96) + 1e-3 * normal(g, 80, 96)
    step = gradient @ A.T
    B = 1e-3 * step / (step.abs() + 1e-8)
    pair = Pair(A, B, 2 * B.T @ gradient, 2 * gradient @ A.T, 2.0).to(torch.float32)
    assume(not ambiguous(pair, None, onto))
    check(pair, onto)


# Values that are not finite.


@given(pairs(sizes=inner_sizes), ontos, st.sampled_from(FIELDS), st.sampled_from(NOT_FINITE), seeds)
def test_not_finite_gives_zero_and_a_norm_that_tells(pair, onto, name, value, index):
    bad = replaced(pair, name, value, index % getattr(pair, name).numel())
    E, norm = perturbations(bad, RHO, onto)
    assert not moves(E) and not norm.isfinite()


@given(
    st.lists(pairs(sizes=inner_sizes), min_size=2, max_size=6),
    ontos,
    st.sampled_from(FIELDS),
    st.sampled_from(NOT_FINITE),
    seeds,
)
def test_bad_layer_leaves_the_others_alone(listed, onto, name, value, seed):
    bad = seed % len(listed)
    with_bad = [replaced(p, name, value) if i == bad else p for i, p in enumerate(listed)]
    rest = [p for i, p in enumerate(listed) if i != bad]
    for scope in ("layer", "global"):
        E, norms = foreach_perturb(with_bad, RHO, onto, scope)
        expected, expected_norms = foreach_perturb(rest, RHO, onto, scope)
        assert not moves(E[bad :: len(listed)]) and not norms[bad].isfinite()
        del E[bad :: len(listed)]
        for e, x in zip(E, expected, strict=True):
            if scope == "layer":
                assert same_bits(e, x)
            else:  # a thread block sums the norms, in an order of their places in the list
                eps, tiny = torch.finfo(e.dtype).eps, torch.finfo(e.dtype).smallest_normal
                torch.testing.assert_close(e, x, rtol=2 * eps, atol=tiny * eps)
        others = [norm for i, norm in enumerate(norms.tolist()) if i != bad]
        assert others == pytest.approx(expected_norms.tolist(), rel=1e-7)


def test_scratch_memory_keeps_nothing_of_a_bad_call():
    pair = make_pair(3, 70, 50, 7)
    expected = perturb(pair)
    for name in FIELDS:
        poisoned = [make_pair(i, 600, 400, 20) for i in range(4)]
        for p in poisoned:
            getattr(p, name).fill_(math.nan)
        foreach_perturb(poisoned)
        for value, e in zip(perturb(pair), expected, strict=True):
            assert same_bits(value, e)


# Results beyond the type.


@given(seeds, sides)  # onto both in its own file
def test_float16_overflow_counts_as_an_infinite_norm(seed, onto):
    # The rule: the Frobenius norm of E beyond the largest finite number of its type.
    pair = make_pair(seed, 20, 30, 4, torch.float16)
    exact, _ = reference.perturb(*pair, 1.0, onto)
    limit = 65504 / float(exact.norm())
    E, norm = perturb(pair, 0.999 * limit, onto)
    assert norm.isfinite() and rounding_errors(E, 0.999 * limit * exact) <= 1.001
    E, norm = perturb(pair, 1.001 * limit, onto)
    assert norm == math.inf and not E.any()


@given(seeds, sides)
def test_float16_overflow_leaves_the_global_norm(seed, onto):
    # Too large an E of one layer is left out, and the rest is divided by what remains.
    small = make_pair(seed, 20, 30, 4, torch.float16)
    tiny = small._replace(A=small.A * 1e-3, B=small.B * 1e-3)  # their inverses are large
    rho = 65504 / 2 / float(reference.perturb(*small, 1.0, onto)[0].norm())
    E, norms = foreach_perturb([small, tiny, small], rho, onto, "global")
    assert norms[1] == math.inf and not E[1].any()
    alone, _ = foreach_perturb([small, small], rho, onto, "global")
    assert same_bits(E[0], alone[0]) and same_bits(E[2], alone[1])


@given(pairs(sizes=inner_sizes), ontos, st.floats(-280, 280))
def test_any_radius_gives_finite_numbers(pair, onto, exponent):
    rho = 10.0**exponent
    E, norm = perturbations(pair, rho, onto)  # asserts that E is finite
    exact, _ = expected_perturbations(pair, rho if onto == "both" else 1.0, onto)
    size = max(float(e.norm()) for e in exact) * (1.0 if onto == "both" else rho)
    if size > 1.01 * torch.finfo(pair.A.dtype).max:
        assert norm == math.inf and not moves(E)


def test_the_largest_radius_where_nothing_is_moved():
    # E_A = 0 beside B = 0, but the factor that it is multiplied with is beyond float64.
    pair = zeroed(make_pair(1, 20, 30, 4, torch.float64, scaling=0.25), "B", "grad_A")
    pair = pair._replace(grad_B=pair.grad_B * 1e-3)
    for scope in ("layer", "global"):
        for onto in ("A", "both"):
            E, norms = foreach_perturb([pair, pair], 1e308, onto, scope)  # asserts that E is finite
            assert not moves(E) and bool((norms == math.inf).all())


def test_radius_zero():
    for dtype in DTYPES:
        pair = make_pair(1, 20, 30, 4, dtype)
        E, norm = perturb(pair, 0.0)
        assert not E.any() and float(norm) == float(perturb(pair, RHO)[1])
        listed = [pair, replaced(pair, "A", math.nan)]
        for onto in ("A", "both"):
            E, norms = foreach_perturb(listed, 0.0, onto, "global")
            assert not moves(E)
            assert norms[0].isfinite() and not norms[1].isfinite()


# Sizes at the ends of the types.


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-18, 1e18, 1e30, 1e36])
@pytest.mark.parametrize("names", [("grad_A", "grad_B"), ("A",), ("B",)])
def test_float32_values_whose_squares_do_not_fit_float32(names, scale):
    for seed in range(3):
        pair = make_pair(seed, 12, 15, 4, torch.float32, 2.0, 2.0, consistent=False)
        if names != ("grad_A", "grad_B"):  # or E is beyond float32
            pair = pair._replace(grad_A=pair.grad_A * scale, grad_B=pair.grad_B * scale)
        scaled = pair._replace(**{name: getattr(pair, name) * scale for name in names})
        for onto in ONTO:
            exact = [float(e.norm()) for e in expected_perturbations(scaled, RHO, onto)[0]]
            if all(1e-30 < size < 3e38 or (size == 0 and onto == "both") for size in exact):
                check(scaled, onto)


@given(seeds, ontos)
def test_denormal_gradients(seed, onto):
    g = generator(seed)
    pair = make_pair(seed, 12, 15, 4, torch.float32)
    pair = pair._replace(
        grad_A=(normal(g, 4, 15) * 1e-41).float(), grad_B=(normal(g, 12, 4) * 1e-41).float()
    )
    assume(onto != "both" or not ambiguous(pair, None, onto))
    E, norm = perturbations(pair, RHO, onto)
    exact, exact_norm = expected_perturbations(pair, RHO, onto)
    assert max(map(error, E, exact)) <= 1e-6
    assert abs(float(norm) - float(exact_norm)) <= 2**-149


@given(seeds, ontos, scopes)
def test_no_perturbation_beside_a_norm_that_is_not_usable(seed, onto, scope):
    # Norms beyond float32, or below, say what was done with E.
    pair = make_pair(seed, 12, 15, 4, torch.float32, consistent=False)
    large = pair._replace(A=pair.A * 1e-30, grad_B=pair.grad_B * 1e30)
    small = pair._replace(
        A=pair.A * 1e20, B=pair.B * 1e20, grad_A=pair.grad_A * 1e-40, grad_B=pair.grad_B * 1e-40
    )
    listed = [large, pair, small]
    E, norms = foreach_perturb(listed, RHO, onto, scope)
    for i, norm in enumerate(norms.tolist()):
        assert not moves(E[i :: len(listed)]) or 0 < norm < math.inf
    ema = [torch.ones_like(e) for e in E]
    skipped = torch.tensor(0)
    norms = perturb_ema_(listed, ema, skipped, 0.9, onto, scope)
    assert int(skipped) == sum(not 0 < norm < math.inf for norm in norms.tolist())


def test_gradients_that_cancel():
    # G_W seen by one factor, -G_W by the other: equation (1) is zero but for rounding.
    g = generator(0)
    for dtype in DTYPES:
        for _ in range(10):
            A, B = factor(g, 3, 9).to(dtype), factor(g, 8, 3).to(dtype)
            gradient = B.double() @ normal(g, 3, 3) @ A.double()
            pair = Pair(
                A, B, (B.double().T @ gradient).to(dtype), (-gradient @ A.double().T).to(dtype), 1.0
            )
            for onto in "BA":
                _, norm = perturb(pair, RHO, onto)  # asserts that E is finite
                size = float(gradient.norm())
                assert 0 <= norm <= 1e-6 * size or dtype in (torch.bfloat16, torch.float16)


@given(
    st.lists(pairs(sizes=inner_sizes), min_size=1, max_size=5),
    ontos,
    scopes,
    st.sampled_from(FIELDS),
    st.sampled_from(NOT_FINITE),
)
def test_moving_average_of_a_bad_layer_is_untouched(listed, onto, scope, name, value):
    listed = [replaced(p, name, value) for p in listed] + [zeroed(listed[0], "grad_A", "grad_B")]
    ema = [torch.randn_like(e) for e in averages(listed, onto)]
    before, skipped = [e.clone() for e in ema], torch.tensor(40)
    perturb_ema_(listed, ema, skipped, 0.9, onto, scope)
    assert all_same_bits(ema, before)
    assert int(skipped) == 40 + len(listed)


def test_bound_of_values_that_are_not_finite():
    # Nothing useful can be done, but one layer must not decide for the others.
    good, bad = torch.ones(2, 5), torch.full((2, 5), math.nan)
    B = torch.ones(6, 2)
    factors = on_device(
        torch.ops.eflat.foreach_bound, [good, bad], [B, B], [1.0, 1.0], 1.0, "layer"
    )
    alone = on_device(torch.ops.eflat.foreach_bound, [good], [B], [1.0], 1.0, "layer")
    assert factors[0] == alone[0] < 1
    assert (
        on_device(torch.ops.eflat.foreach_bound, [good], [B * math.inf], [1.0], 1.0, "layer")
        .isfinite()
        .all()
    )
