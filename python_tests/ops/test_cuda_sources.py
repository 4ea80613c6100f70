"""The CUDA kernels' own sources, run on the CPU, give the reference's numbers.

``python_tests/cpp/ops_host_cuda.cpp`` registers the operators as ``torch.ops.eflat_float64`` and
``torch.ops.eflat_two_float``, after the kernels' two arithmetics: every CUDA thread is a fiber,
workspace and shared memory are poisoned with NaN.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import host_cuda
import pytest
import torch
from adamw_case import (
    assert_same,
    assert_stepped,
    copied,
    mapped,
    one_after_another,
    random_call,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import (
    ADDED,
    DTYPES,
    ONTO,
    RHO,
    Pair,
    added,
    all_near,
    all_same_bits,
    ambiguous,
    averages,
    error,
    floors,
    lists,
    make_pair,
    ontos,
    pairs,
    points,
    same_bits,
    scopes,
    seeds,
    with_small_B,
)

from eflat_ext import reference


@pytest.fixture(autouse=True, scope="module", params=["float64", "two_float"])
def ops(request):
    global kernels
    host_cuda.build()
    kernels = getattr(torch.ops, f"eflat_{request.param}")
    return f"eflat_{request.param}"


def foreach_perturb(given: list[Pair], onto: str, norm_scope: str):
    return kernels.foreach_perturb(*lists(given), RHO, onto, norm_scope, None)


def check(given: list[Pair], onto: str, norm_scope: str) -> None:
    E, norms = foreach_perturb(given, onto, norm_scope)
    expected, expected_norms = reference.foreach_perturb(
        *lists(given), RHO, onto=onto, norm_scope=norm_scope
    )
    for norm, expected_norm in zip(norms, expected_norms, strict=True):
        assert float(norm) == pytest.approx(float(expected_norm), rel=1e-6)
    scope_norms = expected_norms
    if norm_scope == "global":
        scope_norms = expected_norms.norm().expand(len(given))
    least = floors(given, onto, RHO, scope_norms)
    if onto == "both":  # of very different gradients one E is below all numbers of its type
        least = [max(x, torch.finfo(e.dtype).tiny) for x, e in zip(least, E, strict=True)]
    assert all_near(E, expected, least, 1e-6, float64=1e-10, roundings=1.01), given


small = st.integers(1, 40)
# Whole vectors, whole fragments, and neither; one square of a Gram matrix, and several.
sizes = st.one_of(small, st.sampled_from([64, 128, 132, 150]))
ranks = st.one_of(st.integers(1, 12), st.sampled_from([16, 17, 24, 32, 33, 48, 64]))


@settings(max_examples=250)
@example(
    # The norm that a float64 pair shares is no better than the ill-conditioned pair's.
    [
        make_pair(0, 1, 1, 1, torch.float64, 1.0, 1.0, 1.0, False),
        make_pair(0, 2, 1, 3, torch.float32, 1.0, 1e3, 1.0, False),
    ],
    "B",
    "global",
)
@given(st.lists(pairs(sizes=sizes, ranks=ranks), min_size=1, max_size=4), ontos, scopes)
def test_mixed_lists(given, onto, norm_scope):
    assume(not any(ambiguous(pair, None, onto) for pair in given))
    check(given, onto, norm_scope)


@settings(max_examples=20)
@given(
    st.lists(pairs(sizes=small, ranks=st.integers(1, 10)), min_size=1, max_size=3), ontos, scopes
)
def test_naive_kernels_are_a_second_witness(given, onto, norm_scope):
    assume(not any(ambiguous(pair, None, onto) for pair in given))
    E, norms = foreach_perturb(given, onto, norm_scope)
    expected, expected_norms = torch.ops.eflat_naive.foreach_perturb(
        *lists(given), RHO, onto, norm_scope, None
    )
    for norm, expected_norm in zip(norms, expected_norms, strict=True):
        assert float(norm) == pytest.approx(float(expected_norm), rel=1e-6)
    for e, x, floor in zip(E, expected, floors(given, onto, RHO, expected_norms), strict=True):
        assert error(e, x, floor) <= {8: 1e-9, 4: 2e-7, 2: 4e-3}[e.element_size()]


@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, m, r", [(1300, 5, 4), (8, 1100, 16), (700, 600, 33), (520, 640, 64), (90, 80, 96)]
)
def test_more_than_one_block_and_chunk(n, m, r, onto, dtype):
    pair = make_pair(n + r, n, m, r, dtype)
    check([pair], onto, "layer")
    small = with_small_B(pair)  # onto both, where B alone is perturbed
    if onto == "both" and not ambiguous(small, None, onto):
        check([small], onto, "layer")


@pytest.mark.parametrize("n, r", [(280_000, 1), (560_000, 2)])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_long_sides_in_larger_blocks(n, r, onto):
    check([make_pair(n, n, 8, r)], onto, "layer")


@pytest.mark.parametrize(
    "n, m, r, dtype, onto",
    [
        (300, 290, 65, torch.float32, "B"),
        (300, 290, 100, torch.bfloat16, "both"),
        (300, 290, 128, torch.float64, "A"),
        (270, 258, 255, torch.float32, "both"),
        (256, 256, 256, torch.float32, "B"),
        (60, 70, 256, torch.float16, "A"),
        (300, 40, 256, torch.float64, "both"),
    ],
)
def test_large_ranks(n, m, r, dtype, onto):
    check([make_pair(r, n, m, r, dtype)], onto, "layer")


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_more_pairs_than_one_launch_takes(norm_scope, onto):
    given = [make_pair(seed, 9 + seed % 7, 8, 1 + seed % 3) for seed in range(300)]
    check([pair for pair in given if not ambiguous(pair, None, onto)][:290], onto, norm_scope)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_magnitudes_that_float32_products_cannot_hold(scale, onto):
    pair = make_pair(11, 60, 50, 6)
    E, norms = foreach_perturb([pair], onto, "layer")
    pair.grad_A.mul_(scale)
    pair.grad_B.mul_(scale)
    scaled, scaled_norms = foreach_perturb([pair], onto, "layer")
    assert max(map(error, scaled, E)) < 1e-6
    assert float(scaled_norms / norms) == pytest.approx(scale, rel=1e-5)


def test_strides_that_no_vector_fits():
    pair = make_pair(12, 64, 72, 8)
    shifted = []
    for t in pair[:4]:
        storage = torch.empty(t.numel() + 1)
        shifted.append(storage[1:].view(t.shape).copy_(t))  # 4 bytes from alignment
    for onto in ONTO:
        check([Pair(*shifted, pair.scaling)], onto, "layer")


@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("condition", [1e3, 1e4])
def test_second_pass_over_ill_conditioned_factors(condition, onto):
    check([make_pair(5, 60, 70, 9, torch.float64, condition, condition)], onto, "layer")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_bad_layers_leave_the_others_alone(onto, bad, dtype):
    good, other = (make_pair(seed, 30, 20, 4, dtype) for seed in (1, 2))
    if bad == 0:
        other.grad_A.zero_()
        other.grad_B.zero_()
    else:
        other.grad_B[3, 1] = bad
    alone, norm = foreach_perturb([good], onto, "global")
    E, norms = foreach_perturb([good, other], onto, "global")
    assert all_same_bits(E[::2], alone) and norms[0] == norm[0]
    assert not any(bool(e.any()) for e in E[1::2])
    assert norms[1] == 0 if bad == 0 else not bool(norms[1].isfinite())


def test_factor_of_zeros():
    pair = make_pair(7, 40, 30, 5)
    pair.B.zero_()
    pair.grad_A.zero_()
    for onto in ("B", "both"):
        check([pair], onto, "layer")


@pytest.mark.parametrize("grad_of_target", [0.0, 1e-40, 1e-20])
@pytest.mark.parametrize("grad_of_other", [1e-20, 1e4])
def test_gradients_of_very_different_sizes(grad_of_target, grad_of_other):
    pair = make_pair(8, 40, 30, 5)
    pair.B.mul_(1e-3)
    pair.grad_B.mul_(grad_of_target)
    pair.grad_A.mul_(grad_of_other)
    for onto in ("B", "both"):
        check([pair], onto, "layer")


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("onto", ONTO)
def test_moving_average(onto, kind):
    good, bad = make_pair(1, 50, 40, 6), make_pair(2, 20, 30, 3)
    bad.A[0, 0] = math.nan
    ema = [torch.randn_like(e) for e in averages([good, bad], onto)]
    before = [e.clone() for e in ema]
    E = added(ema, kind, 0)
    (there,) = points([good], [e.clone() for e in E[::2]], onto)
    skipped = torch.zeros((), dtype=torch.int64)
    *columns, scaling = lists([good, bad])
    norms = kernels.foreach_perturb_ema_(*columns, E, ema, skipped, scaling, RHO, 0.3, onto)
    expected, _ = reference.foreach_perturb(*lists([there]), RHO, onto)
    for mean, old, x in zip(ema[::2], before[::2], expected, strict=True):
        assert error(mean, 0.7 * old.double() + 0.3 * x) < 1e-6
    assert all_same_bits(ema[1::2], before[1::2])
    assert int(skipped) == 1 and bool(norms[0] > 0) and bool(norms[1].isnan())


def check_step(call) -> None:
    expected, norms = one_after_another(call)
    given_norms = kernels.foreach_adamw_step_(**call)
    torch.testing.assert_close(given_norms, norms, rtol=1e-6, atol=0, equal_nan=True)
    assert_same(call, expected, ("step",))
    assert_stepped(call, expected, ("A", "B", "exp_avg", "exp_avg_sq", "ema"), 1e-9)


@settings(max_examples=60)
@given(
    st.lists(pairs(sizes=sizes, ranks=ranks), min_size=1, max_size=4),
    ontos,
    scopes,
    seeds,
    st.sampled_from(ADDED),
)
def test_adamw_step(given, onto, norm_scope, seed, kind):
    call = random_call(given, onto, norm_scope, seed, kind)
    assume(not any(ambiguous(pair, None, onto) for pair in points(given, call["E"], onto)))
    check_step(call)


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_adamw_step_of_bad_pairs_and_many_launches(norm_scope, onto):
    given = [make_pair(seed, 20, 30, 3) for seed in range(200)]
    given[3].grad_A[1, 2] = math.nan
    given[150].grad_B.zero_()
    given[150].grad_A.zero_()
    check_step(random_call(given, onto, norm_scope))


@pytest.mark.parametrize("onto", ONTO)
def test_adamw_step_of_tensors_that_are_copied_on_write(onto):
    originals = random_call([make_pair(seed, 20, 30, 3) for seed in range(2)], onto)
    before = copied(originals)
    check_step(mapped(originals, torch._lazy_clone))
    assert_same(originals, before)


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
def test_bound(norm_scope):
    given = [make_pair(1, 50, 40, 6), make_pair(2, 20, 30, 3)]
    ema = [torch.randn(p.A.shape) for p in given]
    scaling = [p.scaling for p in given]
    factors = kernels.foreach_bound(ema, [p.B for p in given], scaling, 0.1, norm_scope)
    expected = reference.bounded(
        [(p.A, p.B, p.scaling) for p in given], [e.double() for e in ema], 0.1, norm_scope
    )
    for factor, e, x in zip(factors, ema, expected, strict=True):
        assert error(float(factor) * e.double(), x) < 1e-6


@pytest.mark.parametrize("onto", ["B", "both"])
def test_repeats_bit_for_bit(onto):
    given = [make_pair(seed, 200, 100, 8) for seed in range(3)]
    first, norms = foreach_perturb(given, onto, "layer")
    second, again = foreach_perturb(given, onto, "layer")
    assert all_same_bits(first, second)
    assert same_bits(norms, again)


def test_the_operators_tests_pass(ops):
    """Those of numbers and bad cases, with these kernels in place of the CPU's."""
    files = [
        Path(__file__).with_name(f"test_{x}.py")
        for x in ("operators", "operators_bad_cases", "operators_inputs")
    ]
    # Thread by thread, all of these would take minutes.
    of_points = ("test_mixed_lists", "test_every_rank")
    files += [Path(__file__).with_name(f"test_points.py::{name}") for name in of_points]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        env={**os.environ, "EFLAT_TEST_KERNELS": ops, "HYPOTHESIS_PROFILE": "few"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
