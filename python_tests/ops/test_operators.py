"""The operators against equations (1)-(3) in float64, and their invariants.

The bounds, for the same rtol, onto B, A and both, whatever the condition numbers: float32 1e-6;
16-bit types the rounding of E; float64 1e-10 up to condition number 1e4, 2e-7 up to the cutoff of
1e-7, where the reference itself has no more than eps / rtol. Singular values within 5 % of the
cutoff are left out: there the rank may go either way. So are, onto both, products of the two E
within 1 % of where B alone is perturbed.
"""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import (
    ADDED,
    DTYPES,
    HOST_CUDA,
    ONTO,
    RHO,
    Pair,
    added,
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
    full_rank_pairs,
    generator,
    lists,
    make_pair,
    normal,
    on_device,
    ontos,
    pairs,
    perturb,
    perturb_ema_,
    perturbations,
    points,
    same_bits,
    scopes,
    seeds,
    sides,
    with_small_B,
)

from eflat_ext import reference

F32, F64 = st.just(torch.float32), st.just(torch.float64)


def check(pair: Pair, onto: str, bound: float, rtol: float | None = None) -> None:
    E, norm = perturbations(pair, RHO, onto, rtol)
    expected, expected_norm = expected_perturbations(pair, RHO, onto, rtol)
    assert error(norm, expected_norm) <= max(bound, 2e-7 if norm.dtype == torch.float32 else 0)
    least = floors([pair], onto, RHO, expected_norm.reshape(1), rtol)
    assert all_near(E, expected, least, bound)


# Ranks around and beyond every multiple of a vector, factors taller and flatter than r, and lengths
# around the size of a block.
SHAPES = [
    *[(1, 1, r) for r in (1, 2, 5, 16)],
    *[(37, 50, r) for r in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 36, 37, 38, 50, 51)],
    *[(110, 90, r) for r in (63, 64, 65, 100, 127, 128)],
    *[(1, 300, r) for r in (1, 4, 40)],
    *[(300, 1, r) for r in (1, 4, 40)],
    *[(n, n + 1, 5) for n in (255, 256, 511, 512, 513, 1024, 1537)],
    *[(4200, 20, 8), (20, 4200, 8)],
]
SHAPES_256 = [(270, 258, 255), (256, 256, 256), (60, 70, 256), (300, 40, 256)]


def any_seed() -> int:
    return int(torch.randint(2**31, ()))


@pytest.mark.parametrize("n, m, r", SHAPES)
def test_every_shape(n, m, r):
    # On the executor of CUDA threads such a rank takes seconds, most of them in float64 whatever
    # the type.
    one = HOST_CUDA and r > 64
    for dtype in [DTYPES[any_seed() % 4]] if one else DTYPES:
        pair = make_pair(any_seed(), n, m, r, dtype)
        bound = 1e-10 if dtype == torch.float64 else 1e-6
        for onto in ONTO:
            check(pair, onto, bound)
        small = with_small_B(pair)  # where B alone is perturbed
        if not ambiguous(small, onto="both"):
            check(small, "both", bound)


@pytest.mark.skipif(HOST_CUDA, reason="test_cuda_sources.py has those of the CUDA kernels")
@pytest.mark.parametrize("dtype, shape, onto", [*zip(DTYPES, SHAPES_256, "BABA", strict=True)])
def test_large_ranks(dtype, shape, onto):
    pair = make_pair(any_seed(), *shape, dtype)
    for side in (onto, "both"):
        check(pair, side, 1e-10 if dtype == torch.float64 else 1e-6)


@given(pairs(F32, max_condition=1e3), ontos)
def test_float32(pair, onto):
    assume(not ambiguous(pair, None, onto))
    check(pair, onto, 1e-6)


small_sizes = st.one_of(st.integers(1, 12), st.sampled_from([40, 600]))


@settings(max_examples=100)
@given(pairs(F32, max_condition=1e8, sizes=small_sizes, ranks=st.integers(1, 16)), ontos)
def test_float32_up_to_the_cutoff(pair, onto):
    assume(not ambiguous(pair, None, onto))
    check(pair, onto, 1e-6)


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("condition_B", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("condition_A", [1.0, 1e3, 1e5])
def test_float32_small_and_ill_conditioned(condition_A, condition_B, consistent):
    for n, m, r in [(2, 3, 4), (6, 7, 4), (12, 9, 2)]:
        pair = make_pair(
            any_seed(), n, m, r, torch.float32, condition_A, condition_B, consistent=consistent
        )
        for onto in ONTO:
            if not ambiguous(pair, None, onto):
                check(pair, onto, 1e-6)


@given(pairs(F64, max_condition=1e4), ontos)
@example(make_pair(0, 21, 14, 2, torch.float64, 1e4, 1e4), "B")
@example(make_pair(0, 20, 30, 6, torch.float64, 1.0, 1e4), "A")
@example(make_pair(0, 20, 30, 6, torch.float64, 1e4, 1.0), "B")
@example(make_pair(0, 21, 14, 2, torch.float64, 1e4, 1e4), "both")
@example(make_pair(0, 20, 30, 6, torch.float64, 1.0, 1e4), "both")
@example(make_pair(0, 20, 30, 6, torch.float64, 1e4, 1.0), "both")
def test_float64(pair, onto):
    assume(not ambiguous(pair, None, onto))
    check(pair, onto, 1e-10)


@settings(max_examples=100)
@given(pairs(F64, max_condition=1e9, sizes=small_sizes, ranks=st.integers(1, 24)), ontos)
def test_float64_up_to_the_cutoff(pair, onto):
    assume(not ambiguous(pair, None, onto))
    check(pair, onto, 2e-7)


@given(pairs(st.sampled_from([torch.bfloat16, torch.float16]), max_condition=100), ontos)
def test_16_bit_types_within_their_rounding(pair, onto):
    assume(not ambiguous(pair, None, onto))
    check(pair, onto, 1e-6)


@given(pairs(F32, max_condition=1e6), ontos, st.sampled_from([1e-7, 1e-5, 1e-3, 0.03, 0.3, 0.9]))
def test_a_cutoff_of_the_users_own(pair, onto, rtol):
    assume(not ambiguous(pair, rtol, onto))
    check(pair, onto, 1e-6, rtol)


@pytest.mark.parametrize("scaling", [-1.0, -1e-3, 1e-8, 1e-3, 3.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaling_of_any_sign_and_size(scaling, dtype):
    pair = make_pair(any_seed(), 40, 30, 5, dtype)._replace(scaling=scaling)
    for onto in ONTO:
        check(pair, onto, 1e-6 if dtype == torch.float32 else 1e-10)


mixed_lists = st.lists(pairs(max_condition=50), min_size=1, max_size=8)


@given(mixed_lists, ontos)
def test_foreach_is_perturb_pair_by_pair(listed, onto):
    E, norms = foreach_perturb(listed, RHO, onto)
    for i, pair in enumerate(listed):
        alone, norm = perturbations(pair, RHO, onto)
        assert all_same_bits(E[i :: len(listed)], alone)
        assert float(norms[i]) == float(norm.to(norms.dtype))
    expected = all(p.A.dtype == torch.float64 for p in listed)
    assert norms.dtype == (torch.float64 if expected else torch.float32)


@given(mixed_lists, ontos)
def test_global_norm(listed, onto):
    assume(not any(ambiguous(p, None, onto) for p in listed))
    E, norms = foreach_perturb(listed, RHO, onto, "global")
    expected, expected_norms = reference.foreach_perturb(*lists(listed), RHO, onto, "global")
    layer_norms = foreach_perturb(listed, RHO, onto, "layer")[1]
    assert same_bits(norms, layer_norms)
    for norm, expected_norm in zip(norms, expected_norms, strict=True):
        assert error(norm, expected_norm) <= 1e-6
    least = floors(listed, onto, RHO, expected_norms.norm().expand(len(listed)))
    assert all_near(E, expected, least, 1e-6, roundings=1.01)


@pytest.mark.parametrize("onto", ["B", "both"])
def test_many_layers_in_one_call(onto):
    # On the CPU more than one group of the cache, ragged.
    sizes = torch.randint(1, 900, (20 if HOST_CUDA else 60, 2)).tolist()
    listed = [make_pair(i, n, m, 1 + i % 20) for i, (n, m) in enumerate(sizes)]
    if onto == "both":
        listed[::3] = [with_small_B(pair) for pair in listed[::3]]
        listed = [pair for pair in listed if not ambiguous(pair, None, onto)]
    for scope in ("layer", "global"):
        E, norms = foreach_perturb(listed, RHO, onto, scope)
        expected, expected_norms = reference.foreach_perturb(*lists(listed), RHO, onto, scope)
        assert error(norms, expected_norms) <= 1e-6
        least = floors(listed, onto, RHO, expected_norms)
        assert max(map(error, E, expected, least)) <= 1e-6


# Invariants, without the reference.


@given(pairs(st.sampled_from([torch.float32, torch.float64])), ontos)
def test_scale_of_the_gradients_does_not_matter(pair, onto):
    assume(onto != "both" or not ambiguous(pair, None, onto))
    E, norm = perturbations(pair, RHO, onto)
    least = floors([pair], onto, RHO, norm.reshape(1))
    for power in (-60, -3, 5, 60):  # of two: the products are exact
        scale = 2.0**power
        scaled = pair._replace(grad_A=pair.grad_A * scale, grad_B=pair.grad_B * scale)
        E_scaled, norm_scaled = perturbations(scaled, RHO, onto)
        assert max(map(error, E_scaled, E, least)) <= 1e-6
        assert error(norm_scaled, norm * scale) <= 1e-6


@given(pairs(F64), sides)
def test_radius_is_kept(pair, onto):
    E, _ = perturb(pair, RHO, onto)
    W_change = pair.scaling * (E @ pair.A if onto == "B" else pair.B @ E)
    assert W_change.norm() <= RHO * (1 + 1e-9)


@given(seeds, sides)
def test_radius_is_reached_inside_the_carrying_space(seed, onto):
    # Square A: every row is in its row space; square B: every column in its column space.
    n, m = (40, 6) if onto == "B" else (6, 40)
    pair = make_pair(seed, n, m, 6, torch.float64)
    E, _ = perturb(pair, RHO, onto)
    W_change = pair.scaling * (E @ pair.A if onto == "B" else pair.B @ E)
    assert float(W_change.norm()) == pytest.approx(RHO, rel=1e-9)


@given(full_rank_pairs(), seeds, sides)
def test_perturbation_belongs_to_W_not_to_its_factors(pair, seed, onto):
    r = pair.A.shape[0]
    R = normal(generator(seed), r, r) / r + 2 * torch.eye(r, dtype=torch.float64)
    other = Pair(
        torch.linalg.solve(R, pair.A),
        pair.B @ R,
        R.T @ pair.grad_A,
        torch.linalg.solve(R, pair.grad_B.T).T,
        pair.scaling,
    )
    E, norm = perturb(pair, RHO, onto)
    E_other, norm_other = perturb(other, RHO, onto)
    assert error(norm_other, norm) <= 1e-9
    if onto == "B":
        assert error(E_other @ other.A, E @ pair.A) <= 1e-8
    else:
        assert error(other.B @ E_other, pair.B @ E) <= 1e-8


@given(pairs(st.sampled_from([torch.float32, torch.float64])))
def test_frozen_factor_leaves_the_other_term_alone(pair):
    # One gradient zero: (1) has one term, with the pseudo-inverse of the other factor.
    for name in ("grad_A", "grad_B"):
        frozen = pair._replace(**{name: torch.zeros_like(getattr(pair, name))})
        assume(not ambiguous(frozen))
        for onto in ONTO:
            if onto != "both" or not ambiguous(frozen, None, onto):
                check(frozen, onto, 1e-6)


# The averaging operator and the bound.


@given(
    mixed_lists, ontos, scopes, st.sampled_from(ADDED), st.sampled_from([0.0, 0.1, 0.9, 1.0]), seeds
)
def test_moving_average(listed, onto, scope, kind, beta, seed):
    listed[0] = listed[0].clone()
    listed[0].grad_B[0, 0] = math.nan
    g = generator(seed)
    ema = [normal(g, *e.shape).to(e.dtype) for e in averages(listed, onto)]
    given = added(ema, kind, seed)
    there = points(listed, given, onto)
    assume(not any(ambiguous(p, None, onto) for p in there[1:]))
    before, skipped = [e.clone() for e in ema], torch.tensor(5)
    norms = perturb_ema_(listed, ema, skipped, beta, onto, scope, given)
    E, expected_norms = reference.foreach_perturb(*lists(there), RHO, onto, scope)
    same_norms = foreach_perturb(there, RHO, onto, scope)[1]
    assert same_bits(norms, same_norms)
    assert int(skipped) == 5 + sum(not (0 < x < math.inf) for x in expected_norms.tolist())
    for i in range(0, len(ema), len(listed)):
        assert same_bits(ema[i], before[i])  # the NaN layer
    for i, (mean, old, e) in enumerate(zip(ema, before, E, strict=True)):
        if 0 < expected_norms[i % len(listed)] < math.inf:
            expected = (1 - beta) * old.double() + beta * e
            # float32 averages of 16-bit factors keep what E's own type would round away
            assert error(mean, expected) <= (1e-10 if mean.dtype == torch.float64 else 1e-6)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(1, 600), st.integers(1, 40), st.integers(1, 12), dtypes),
        min_size=1,
        max_size=5,
    ),
    seeds,
    scopes,
    st.floats(-3, 3),
)
def test_bound_of_averages_onto_A(shapes, seed, scope, exponent):
    g = generator(seed)
    pairs = [
        (None, normal(g, n, r).to(dtype), 0.5 + i) for i, (n, _, r, dtype) in enumerate(shapes)
    ]
    ema = [
        normal(g, r, m).to(torch.float64 if dtype == torch.float64 else torch.float32)
        for _, m, r, dtype in shapes
    ]
    rho = 10.0**exponent
    factors = on_device(
        torch.ops.eflat.foreach_bound,
        ema,
        [b for _, b, _ in pairs],
        [s for _, _, s in pairs],
        rho,
        scope,
    )
    double = all(e.dtype == torch.float64 for e in ema)
    assert factors.dtype == (torch.float64 if double else torch.float32)
    assert bool((factors <= 1).all())
    expected = reference.bounded(pairs, [e.double() for e in ema], rho, scope)
    for f, e, x in zip(factors, ema, expected, strict=True):
        assert error(e.double() * f.double(), x) <= 2e-7


def test_bound_of_zero_is_one():
    ema, B = torch.zeros(3, 8), factor(generator(0), 9, 3).float()
    for scope in ("layer", "global"):
        assert on_device(torch.ops.eflat.foreach_bound, [ema], [B], [2.0], 0.0, scope).tolist() == [
            1.0
        ]
        assert on_device(
            torch.ops.eflat.foreach_bound, [ema + 1], [B], [2.0], 0.0, scope
        ).tolist() == [0.0]
