"""The reference itself: equations (1)-(3) and the training loops, against independent algebra."""

import math

import pytest
import torch
from hypothesis import assume, given
from strategies import (
    RHO,
    Pair,
    ambiguous,
    full_rank_pairs,
    lists,
    make_pair,
    normal,
    ontos,
    scopes,
    seeds,
    sides,
)
from strategies import generator as make_generator
from torch import Tensor

from eflat_ext import reference

GRADIENT_SCALES = (1e-20, 1e-3, 7.0, 1e20)


def gradient_of(pair: Pair) -> Tensor:
    return reference.full_space_gradient(*pair)


def carried(pair: Pair, E: Tensor, onto: str) -> Tensor:
    """Return the change of W by E."""
    A, B = pair.A.double(), pair.B.double()
    return pair.scaling * (E @ A if onto == "B" else B @ E)


@given(full_rank_pairs())
def test_full_space_gradient_solves_its_least_squares_problems(pair):
    # (A^T)^+ and (B^T)^+ for factors of full rank, without a pseudo-inverse.
    A, B, grad_A, grad_B, s = pair
    term_A = torch.linalg.solve(A @ A.T, A).T @ grad_B.T
    term_B = B @ torch.linalg.solve(B.T @ B, grad_A)
    torch.testing.assert_close(gradient_of(pair), (term_A.T + term_B) / (2 * s), rtol=0, atol=1e-9)


@given(seeds, sides)
def test_estimate_of_a_gradient_inside_both_spaces_is_exact(seed, onto):
    # G_W = B X A has its columns in B's and its rows in A's space: both terms give G_W / 2.
    g = make_generator(seed)
    A, B, s = normal(g, 3, 9), normal(g, 8, 3), -1.5
    gradient = B @ normal(g, 3, 3) @ A
    pair = Pair(A, B, s * B.T @ gradient, s * gradient @ A.T, s)
    torch.testing.assert_close(gradient_of(pair), gradient, rtol=1e-9, atol=1e-9)
    E, norm = reference.perturb(*pair, RHO, onto)
    torch.testing.assert_close(norm, gradient.norm(), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        carried(pair, E, onto), RHO * gradient / gradient.norm(), rtol=1e-7, atol=1e-10
    )


@given(full_rank_pairs(), sides)
def test_gram_form_gives_the_same_numbers(pair, onto):
    A, B, grad_A, grad_B, s = pair
    inverse_A, inverse_B = torch.linalg.inv(A @ A.T), torch.linalg.inv(B.T @ B)
    N, C = grad_A @ A.T, B.T @ grad_B
    square = (
        torch.trace(inverse_A @ grad_B.T @ grad_B)
        + torch.trace(inverse_B @ grad_A @ grad_A.T)
        + 2 * torch.trace(inverse_A @ C.T @ inverse_B @ N)
    )
    E, norm = reference.perturb(*pair, RHO, onto)
    torch.testing.assert_close((2 * s * norm) ** 2, square, rtol=1e-8, atol=0)
    c = RHO / (2 * s**2 * norm)
    if onto == "B":
        expected = c * (grad_B @ inverse_A + B @ inverse_B @ N @ inverse_A)
    else:
        expected = c * (inverse_B @ grad_A + inverse_B @ C @ inverse_A @ A)
    torch.testing.assert_close(E, expected, rtol=1e-6, atol=1e-9)


@given(full_rank_pairs(), sides)
def test_carried_perturbation_is_a_projection_of_the_full_one(pair, onto):
    E, norm = reference.perturb(*pair, RHO, onto)
    E_W = RHO * gradient_of(pair) / norm
    torch.testing.assert_close(E_W.norm(), torch.tensor(RHO, dtype=torch.float64))
    factor = pair.A if onto == "B" else pair.B
    if onto == "B":
        projected = E_W @ torch.linalg.pinv(factor) @ factor
    else:
        projected = factor @ torch.linalg.pinv(factor) @ E_W
    W_change = carried(pair, E, onto)
    torch.testing.assert_close(W_change, projected, rtol=1e-8, atol=1e-10)
    assert W_change.norm() <= RHO * (1 + 1e-12)


@given(seeds)
def test_radius_is_reached_when_the_row_space_holds_the_gradient(seed):
    # grad_A with rows in A's row space puts the rows of G_hat there.
    g = make_generator(seed)
    A, B = normal(g, 4, 11), normal(g, 9, 4)
    pair = Pair(A, B, normal(g, 4, 4) @ A, normal(g, 9, 4), 2.0)
    E, _ = reference.perturb(*pair, RHO, "B")
    assert float(carried(pair, E, "B").norm()) == pytest.approx(RHO, rel=1e-10)
    # m = r: every row is in A's row space.
    square = make_pair(seed, 9, 4, 4, torch.float64)
    E, _ = reference.perturb(*square, RHO, "B")
    assert float(carried(square, E, "B").norm()) == pytest.approx(RHO, rel=1e-10)


@given(full_rank_pairs(), ontos)
def test_scale_of_the_gradients_does_not_matter(pair, onto):
    assume(onto != "both" or not ambiguous(pair, None, onto))
    E, norms = reference.foreach_perturb(*lists([pair]), RHO, onto)
    for scale in GRADIENT_SCALES:
        scaled = pair._replace(grad_A=scale * pair.grad_A, grad_B=scale * pair.grad_B)
        E_scaled, norms_scaled = reference.foreach_perturb(*lists([scaled]), RHO, onto)
        torch.testing.assert_close(E_scaled, E, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(norms_scaled, scale * norms, rtol=1e-9, atol=0)


@given(full_rank_pairs(), seeds)
def test_perturbation_belongs_to_W_not_to_its_factors(pair, seed):
    r = pair.A.shape[0]
    R = normal(make_generator(seed), r, r) / r + 2 * torch.eye(r, dtype=torch.float64)
    other = Pair(
        torch.linalg.solve(R, pair.A),
        pair.B @ R,
        R.T @ pair.grad_A,
        torch.linalg.solve(R, pair.grad_B.T).T,  # G_B R^-T
        pair.scaling,
    )
    torch.testing.assert_close(gradient_of(other), gradient_of(pair), rtol=1e-7, atol=1e-9)
    for onto in "BA":
        E, norm = reference.perturb(*pair, RHO, onto)
        E_other, norm_other = reference.perturb(*other, RHO, onto)
        torch.testing.assert_close(norm_other, norm, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            carried(other, E_other, onto), carried(pair, E, onto), rtol=1e-7, atol=1e-9
        )


@given(full_rank_pairs())
def test_zero_B_and_frozen_factors_leave_one_term(pair):
    zero_A, zero_B = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
    term_A = pair.grad_B @ torch.linalg.pinv(pair.A.T) / (2 * pair.scaling)
    term_B = torch.linalg.pinv(pair.B.T) @ pair.grad_A / (2 * pair.scaling)
    for changed, expected in (
        (pair._replace(B=zero_B), term_A),
        (pair._replace(A=zero_A), term_B),
        (pair._replace(grad_A=zero_A), term_A),
        (pair._replace(grad_B=zero_B), term_B),
    ):
        torch.testing.assert_close(gradient_of(changed), expected, rtol=1e-9, atol=1e-11)
    start = pair._replace(B=zero_B)
    E, _ = reference.perturb(*start, RHO, "B")
    assert float(carried(start, E, "B").norm()) == pytest.approx(RHO, rel=1e-10)
    assert not reference.perturb(*start, RHO, "A")[0].any()


def test_cutoff_decides_which_directions_count():
    # Columns of A^T and B with singular values 1 and 1e-3: one or two directions, by rtol.
    A = torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64))
    grad = torch.ones(2, 2, dtype=torch.float64)
    both = reference.full_space_gradient(A, A, grad, grad, 1.0, rtol=1e-4)
    one = reference.full_space_gradient(A, A, grad, grad, 1.0, rtol=1e-2)
    torch.testing.assert_close(both, torch.tensor([[1.0, 500.5], [500.5, 1000.0]]).double())
    torch.testing.assert_close(one, torch.tensor([[1.0, 0.5], [0.5, 0.0]]).double())


def test_default_cutoffs():
    def rtol(n, m, r, dtype):
        return reference.default_rtol(
            torch.empty(r, m, dtype=dtype), torch.empty(n, r, dtype=dtype)
        )

    eps32, eps64 = 2.0**-23, 2.0**-52
    assert rtol(100, 30, 4, torch.float32) == rtol(30, 100, 4, torch.bfloat16) == 100 * eps32
    assert rtol(3, 4, 50, torch.float16) == 50 * eps32
    assert rtol(100_000, 4, 4, torch.float32) == 1e-3
    assert rtol(100, 30, 4, torch.float64) == 1e-7
    assert rtol(10**9, 4, 0, torch.float64) == 10**9 * eps64


@given(seeds, ontos, scopes)
def test_layers_that_have_no_perturbation_get_zero_and_the_others_their_own(seed, onto, scope):
    pairs = [make_pair(seed + i, 6 + i, 5, 3, torch.float64) for i in range(4)]
    bad, empty = pairs[1].clone(), pairs[2].clone()
    bad.grad_A[0, 0] = math.inf
    empty.grad_A.zero_()
    empty.grad_B.zero_()
    listed = [pairs[0], bad, empty, pairs[3]]
    E, norms = reference.foreach_perturb(*zip(*listed, strict=True), RHO, onto, scope)
    assert math.isnan(norms[1]) and norms[2] == 0
    assert not any(bool(e.any()) for e in [*E[1::4], *E[2::4]])
    total = math.hypot(norms[0], norms[3])
    for i in (0, 3):
        alone, norm = reference.foreach_perturb(*lists([pairs[i]]), RHO, onto)
        share = float(norm) / total if scope == "global" else 1.0
        torch.testing.assert_close(E[i::4], [e * share for e in alone], rtol=1e-12, atol=0)


# The loops, by hand: W = w0 + s b a with numbers for factors and loss(w) = w^2 / 2.
W0, S, A0, B0, LR, RHO1 = 1.0, 2.0, 3.0, 0.5, 0.01, 0.1


@pytest.fixture
def scalar_problem():
    a = torch.tensor([[A0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[B0]], dtype=torch.float64, requires_grad=True)
    base = torch.optim.SGD([a, b], lr=LR)
    seen = []

    def closure():
        base.zero_grad()
        w = W0 + S * b * a
        seen.append(w.item())
        loss = (w**2 / 2).sum()
        loss.backward()
        return loss

    return a, b, base, closure, seen


def test_flat_lora_step_by_hand(scalar_problem):
    a, b, base, closure, seen = scalar_problem
    loss = reference.flat_lora_step([(a, b, S)], base, closure, RHO1)
    w = W0 + S * B0 * A0  # 4, and G_hat = G_W = w exactly, so W moves by rho
    assert float(loss) == w**2 / 2
    assert seen == pytest.approx([w, w + RHO1])
    b_there = B0 + RHO1 / (S * A0)
    assert float(a) == pytest.approx(A0 - LR * S * b_there * (w + RHO1))
    assert float(b) == pytest.approx(B0 - LR * S * A0 * (w + RHO1))


def test_flat_lora_step_onto_A_by_hand(scalar_problem):
    a, b, base, closure, seen = scalar_problem
    reference.flat_lora_step([(a, b, S)], base, closure, RHO1, onto="A")
    w = W0 + S * B0 * A0
    assert seen == pytest.approx([w, w + RHO1])
    a_there = A0 + RHO1 / (S * B0)
    assert float(a) == pytest.approx(A0 - LR * S * B0 * (w + RHO1))
    assert float(b) == pytest.approx(B0 - LR * S * a_there * (w + RHO1))


def test_eflat_lora_steps_by_hand(scalar_problem):
    a, b, base, closure, seen = scalar_problem
    ema = [torch.zeros(1, 1, dtype=torch.float64)]
    a_now, b_now, mean = A0, B0, 0.0
    for _ in range(3):
        reference.eflat_lora_step([(a, b, S)], base, closure, ema, RHO1, beta=0.75)
        w = W0 + S * (b_now + mean) * a_now
        assert seen[-1] == pytest.approx(w)
        E = RHO1 / (S * a_now)
        a_next = a_now - LR * S * (b_now + mean) * w
        b_now -= LR * S * a_now * w
        a_now, mean = a_next, 0.25 * mean + 0.75 * E
        assert float(a) == pytest.approx(a_now)
        assert float(b) == pytest.approx(b_now)
        assert float(ema[0]) == pytest.approx(mean)
    assert len(seen) == 3  # one gradient a step


def test_lora_sam_step_by_hand(scalar_problem):
    a, b, base, closure, seen = scalar_problem
    reference.lora_sam_step([(a, b, S)], base, closure, RHO1)
    w = W0 + S * B0 * A0
    g_a, g_b = S * B0 * w, S * A0 * w
    nu = math.hypot(g_a, g_b)
    a1, b1 = A0 + RHO1 * g_a / nu, B0 + RHO1 * g_b / nu
    w1 = W0 + S * a1 * b1
    assert seen == pytest.approx([w, w1])
    assert float(a) == pytest.approx(A0 - LR * S * b1 * w1)
    assert float(b) == pytest.approx(B0 - LR * S * a1 * w1)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_lora_sam_step_without_a_gradient_leaves_the_pair_alone(scope):
    a, b = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    base = torch.optim.SGD([a, b], lr=LR)

    def closure():
        base.zero_grad()
        loss = (0 * a * b).sum()
        loss.backward()
        return loss

    reference.lora_sam_step([(a, b, S)], base, closure, RHO1, scope)
    assert float(a) == float(b) == 1


@given(seeds, scopes)
def test_bounded_averages_stay_within_the_radius(seed, scope):
    g = make_generator(seed)
    pairs = [(normal(g, 2, 7), normal(g, 5, 2), s) for s in (1.0, -3.0, 0.5)]
    ema = [normal(g, 2, 7) * scale for scale in (1e-3, 1e3, 1.0)]

    def norms(averages):
        return [float((s * b @ e).norm()) for (_, b, s), e in zip(pairs, averages, strict=True)]

    rho = 0.5 * norms(ema)[2]  # the first below, the others above
    before, after = norms(ema), norms(reference.bounded(pairs, ema, rho, scope))
    if scope == "layer":
        assert after == pytest.approx([min(x, rho) for x in before])
    else:
        assert math.hypot(*after) == pytest.approx(rho)
        assert after == pytest.approx([x * rho / math.hypot(*before) for x in before])
    small = [e * 1e-9 for e in ema]
    unchanged = reference.bounded(pairs, small, rho, scope)
    assert all(torch.equal(x, y) for x, y in zip(unchanged, small, strict=True))
