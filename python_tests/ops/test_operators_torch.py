"""The operators as PyTorch operators: registration, autograd, tracing."""

import math

import pytest
import torch
from adamw_case import assert_same, copied, mapped, on_meta, random_call
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    DTYPES,
    ONTO,
    RHO,
    added,
    all_same_bits,
    ambiguous,
    averages,
    error,
    lists,
    ontos,
    same_bits,
    seeds,
)
from strategies import make_pair_on_device as make_pair
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import eflat_ext
from eflat_ext.ops.autograd import gram_form, tangent_form

ops = torch.ops.eflat


def leaves(pair):
    return [t.clone().requires_grad_() for t in pair[:4]]


def two_pairs(dtype, seed=0):
    return [make_pair(seed, 9, 11, 3, dtype), make_pair(seed + 1, 12, 7, 4, dtype)]


# Registration. opcheck: schema (nothing but what it says is modified or aliased), autograd, fake
# kernels, tracing with dynamic shapes.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "onto, scope, rtol", [("B", "layer", None), ("A", "global", 1e-5), ("both", "global", 1e-5)]
)
def test_opcheck(dtype, onto, scope, rtol):
    pair, listed = make_pair(0, 9, 11, 3, dtype), two_pairs(dtype)
    A, B, grad_A, grad_B, scaling = lists(listed)
    for op, arguments in (
        (ops.perturb, (*pair, RHO, "B" if onto == "both" else onto, rtol)),
        (ops.foreach_perturb, (A, B, grad_A, grad_B, scaling, RHO, onto, scope, rtol)),
        (
            ops.foreach_perturb_ema_,
            (
                *(
                    A,
                    B,
                    grad_A,
                    grad_B,
                    added(averages(listed, onto), "own", 0),
                    averages(listed, onto),
                    torch.tensor(0, device=DEVICE),
                    scaling,
                ),
                *(RHO, 0.9, onto, scope, rtol),
            ),
        ),
        (ops.foreach_adamw_step_, tuple(random_call(listed, onto, scope).values())),
        (ops.foreach_bound, (averages(listed, "A"), B, scaling, RHO, scope)),
    ):
        result = torch.library.opcheck(op.default, arguments)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck_with_gradients(dtype):
    pair, listed = make_pair(0, 9, 11, 3, dtype), two_pairs(dtype)
    columns = [[t.clone().requires_grad_() for t in column] for column in lists(listed)[:4]]
    for op, arguments in (
        (ops.perturb, (*leaves(pair), 2.0, RHO, "A", None)),
        (ops.foreach_perturb, (*columns, [2.0, 1.0], RHO, "B", "global", 1e-5)),
        (ops.foreach_perturb, (*columns, [2.0, 1.0], RHO, "both", "layer", 1e-5)),
    ):
        result = torch.library.opcheck(op.default, arguments)
        assert set(result.values()) == {"SUCCESS"}, result


def test_empty_lists_give_the_same_type_of_norms_traced_and_not():
    empty = [[], [], [], [], []]
    torch.set_default_dtype(torch.float64)
    try:
        with FakeTensorMode():
            fake = [ops.foreach_perturb(*empty, RHO)[1], ops.foreach_bound([], [], [], RHO)]
        real = [ops.foreach_perturb(*empty, RHO)[1], ops.foreach_bound([], [], [], RHO)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [norms.dtype for norms in fake] == [norms.dtype for norms in real]


def test_meta_tensors_give_shapes_and_dtypes():
    for dtype in DTYPES:
        listed = two_pairs(dtype)
        columns = lists(listed)
        meta = [[t.to("meta") for t in column] for column in columns[:4]]
        for onto in ONTO:
            E, norms = ops.foreach_perturb(*meta, [1.0, 2.0], RHO, onto)
            real, real_norms = ops.foreach_perturb(*columns[:4], [1.0, 2.0], RHO, onto)
            for x, y in zip([*E, norms], [*real, real_norms], strict=True):
                assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
                assert x.device.type == "meta"
            if onto == "both":
                continue
            E, norm = ops.perturb(*[column[0] for column in meta], 1.0, RHO, onto)
            real_norm = ops.perturb(*[column[0] for column in columns[:4]], 1.0, RHO, onto)[1]
            assert E.shape == real[0].shape and norm.dtype == real_norm.dtype and norm.dim() == 0


@pytest.mark.parametrize("onto", ONTO)
def test_meta_tensors_of_the_fused_step(onto):
    for dtype in DTYPES:
        call = random_call(two_pairs(dtype), onto)
        norms = ops.foreach_adamw_step_(**on_meta(call))
        real = ops.foreach_adamw_step_(**call)
        assert (norms.shape, norms.dtype) == (real.shape, real.dtype)
        assert norms.device.type == "meta"


# Autograd.


@settings(max_examples=10)
@given(seeds, ontos, st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_gradcheck(seed, onto, r, more_n, more_m):
    pair = make_pair(seed, r + more_n, r + more_m, r, torch.float64, 3.0, 3.0)
    assume(onto != "both" or not ambiguous(pair._replace(scaling=-1.5), None, onto, 0.5))

    def function(*t):
        if onto != "both":
            return eflat_ext.perturb(*t, -1.5, 0.5, onto)
        E, norms = eflat_ext.foreach_perturb(*([x] for x in t), [-1.5], 0.5, onto)
        return (*E, norms)

    assert torch.autograd.gradcheck(function, leaves(pair), atol=1e-4)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("onto, rho", [("B", 0.5), ("A", 0.5), ("both", 0.05), ("both", 5.0)])
def test_gradcheck_of_lists(onto, rho, scope):
    listed = [make_pair(i, 4, 5, 2 + i, torch.float64, 3.0, 3.0) for i in range(2)]

    def function(*t):
        columns = [list(t[i::4]) for i in range(4)]
        E, norms = eflat_ext.foreach_perturb(*columns, [2.0, -1.0], rho, onto, scope)
        return (*E, norms)

    if onto == "both":  # of the larger radius B alone is perturbed
        E = function(*listed[0][:4], *listed[1][:4])
        assert bool(E[0].any()) == bool(E[1].any()) == (rho < 1)
    assert torch.autograd.gradcheck(function, [*leaves(listed[0]), *leaves(listed[1])], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_smaller_types(dtype):
    pair = make_pair(5, 20, 30, 4, dtype)
    small, wide = leaves(pair), leaves(pair.to(torch.float64))
    for t in (small, wide):
        E, norm = eflat_ext.perturb(*t, 2.0, RHO, rtol=1e-5)
        (E.double().square().sum() + norm.double()).backward()
    for x, y in zip(small, wide, strict=True):
        assert x.grad.dtype == dtype
        assert error(x.grad, y.grad) <= (1e-5 if dtype == torch.float32 else 0.05)


def test_gradients_of_some_inputs_and_some_outputs():
    pair = make_pair(5, 20, 30, 4, torch.float64)
    everything = leaves(pair)
    E, norm = eflat_ext.perturb(*everything, 2.0, RHO)
    expected = torch.autograd.grad(norm, everything)
    for i in range(4):
        some = [t.clone().requires_grad_(i == k) for k, t in enumerate(pair[:4])]
        eflat_ext.perturb(*some, 2.0, RHO)[1].backward()
        assert_close(some[i].grad, expected[i])
        assert all(t.grad is None for k, t in enumerate(some) if k != i)
    assert E.requires_grad and not eflat_ext.perturb(*pair, RHO)[0].requires_grad


@given(seeds, st.sampled_from(["B", "both"]))
def test_gradients_at_the_start_of_training_are_finite(seed, onto):
    pair = make_pair(seed, 8, 9, 3, torch.float64)
    inputs = leaves(pair._replace(B=torch.zeros_like(pair.B)))
    E, norms = eflat_ext.foreach_perturb(*([t] for t in inputs), [2.0], RHO, onto)
    (E[-1].sum() + norms.sum()).backward()
    assert all(bool(t.grad.isfinite().all()) for t in inputs)


@pytest.mark.parametrize("onto", ONTO)
def test_second_derivatives_are_right_or_refused(onto):
    # The operators promise one differentiation. Another must not silently lose terms.
    pair = make_pair(5, 8, 9, 3, torch.float64, 3.0, 3.0)

    def second(function):
        inputs = leaves(pair)
        E = function(*inputs)
        target, grad = inputs[::2] if onto == "A" else inputs[1::2]
        (first,) = torch.autograd.grad((E * grad).sum(), target, create_graph=True)
        return torch.autograd.grad(first.square().sum(), target)[0]

    def plain(*inputs):
        if onto == "both":
            _, U, norm = tangent_form(*inputs, 2.0, RHO, 1e-7)
            return RHO / (8 * norm) * U
        U, _, c = gram_form(*inputs, 2.0, RHO, onto)
        return c * U

    def operator(*inputs):
        if onto == "both":
            return eflat_ext.foreach_perturb(*([t] for t in inputs), [2.0], RHO, onto)[0][1]
        return eflat_ext.perturb(*inputs, 2.0, RHO, onto)[0]

    try:
        result = second(operator)
    except RuntimeError:
        return
    assert error(result, second(plain)) <= 1e-8


def test_in_place_operators_stay_outside_the_graph():
    # Their arguments are parameters; what they return is for looking at, not for differentiating.
    listed = two_pairs(torch.float32)
    A, B, grad_A, grad_B, scaling = lists(listed)
    A, B = ([torch.nn.Parameter(t) for t in column] for column in (A, B))
    ema = averages(listed)
    norms = ops.foreach_perturb_ema_(
        A, B, grad_A, grad_B, ema, ema, torch.tensor(0, device=DEVICE), scaling, RHO, 0.9
    )
    factors = ops.foreach_bound(averages(listed, "A"), B, scaling, RHO)
    assert not any(t.requires_grad for t in [*ema, norms, factors])
    assert all(t._version > 0 for t in ema)  # autograd sees what is modified


# Tracing.


def doubled(A, B, grad_A, grad_B, scaling, onto):
    E, norms = eflat_ext.foreach_perturb(A, B, grad_A, grad_B, scaling, RHO, onto, "global")
    return [2 * e for e in E], norms + 1


def averaged(A, B, grad_A, grad_B, ema, skipped, scaling, onto):
    pairs = (A, B, grad_A, grad_B)
    norms = ops.foreach_perturb_ema_(*pairs, ema, ema, skipped, scaling, RHO, 0.9, onto)
    factors = ops.foreach_bound(grad_A, B, scaling, RHO)
    return norms * 2, factors * 2, [e + 1 for e in ema]


@pytest.mark.parametrize("onto", ["B", "both"])
@pytest.mark.parametrize(
    "backend, dynamic", [("inductor", None), ("aot_eager", None), ("aot_eager", True)]
)
def test_compiled_is_eager(backend, dynamic, onto):
    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend=backend, dynamic=dynamic)
    compiled_average = torch.compile(averaged, fullgraph=True, backend=backend, dynamic=dynamic)
    for seed in range(3):
        listed = [make_pair(seed, 9 + 4 * seed, 11, 3), make_pair(7, 12, 7, 4)]
        arguments = (*lists(listed), onto)
        for x, y in zip(compiled(*arguments), doubled(*arguments), strict=True):
            assert all_same_bits(x, y)
        *columns, scaling = lists(listed)
        states = [(averages(listed, onto), torch.tensor(seed, device=DEVICE)) for _ in range(2)]
        results = [
            function(*columns, *state, scaling, onto)
            for function, state in zip((compiled_average, averaged), states, strict=True)
        ]
        for x, y in zip(*results, strict=True):
            assert all_same_bits(x, y)
        assert all_same_bits(states[0][0], states[1][0])
        assert same_bits(states[0][1], states[1][1])


@pytest.mark.parametrize("onto, kind", [("B", "average"), ("both", "own"), ("both", "nothing")])
@pytest.mark.parametrize(
    "backend, dynamic", [("inductor", None), ("aot_eager", None), ("aot_eager", True)]
)
def test_compiled_fused_step_is_eager(backend, dynamic, onto, kind):
    torch._dynamo.reset()

    def stepped(call):
        return ops.foreach_adamw_step_(**call) * 2, [b + 1 for b in call["B"]]

    compiled = torch.compile(stepped, fullgraph=True, backend=backend, dynamic=dynamic)
    for seed in range(2):
        listed = [make_pair(seed, 9 + 4 * seed, 11, 3), make_pair(7, 12, 7, 4)]
        call = random_call(listed, onto, kind=kind)
        other = copied(call)
        (norms, moved), (expected, moved_too) = compiled(call), stepped(other)
        assert same_bits(norms, expected)
        assert all_same_bits(moved, moved_too)
        assert_same(call, other)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_backward(dynamic):
    torch._dynamo.reset()

    def loss(*t):
        E, norm = eflat_ext.perturb(*t, 2.0, RHO)
        return (E * E).sum() + norm

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (9, 13):
        inputs = [leaves(make_pair(n, n, 11, 3, torch.float64)) for _ in range(2)]
        for function, t in zip((compiled, loss), inputs, strict=True):
            function(*t).backward()
        for x, y in zip(*inputs, strict=True):
            assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("bad", [0.0, math.nan])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_a_layer_that_is_left_alone_has_no_gradient_and_spoils_no_other(onto, bad, scope):
    good, other = make_pair(1, 7, 6, 3, torch.float64), make_pair(2, 8, 5, 2, torch.float64)
    other = other._replace(grad_A=other.grad_A * bad, grad_B=other.grad_B * bad)
    inputs = [t.requires_grad_() for pair in (good, other) for t in pair[:4]]
    E, norms = ops.foreach_perturb(*lists([good, other]), RHO, onto, scope)
    gradients = torch.autograd.grad(sum(e.sum() for e in E) + norms[0], inputs)
    alone, norm = ops.foreach_perturb(*lists([good]), RHO, onto)
    expected = torch.autograd.grad(sum(e.sum() for e in alone) + norm[0], inputs[:4])
    for gradient, x in zip(gradients, expected, strict=False):
        torch.testing.assert_close(gradient, x)
    assert not any(bool(gradient.any()) for gradient in gradients[4:])


def test_norms_and_perturbations_agree_in_lists_of_mixed_types():
    tiny = make_pair(3, 9, 8, 2, torch.float64, consistent=False)
    tiny = tiny._replace(grad_A=tiny.grad_A * 1e-60, grad_B=tiny.grad_B * 1e-60)
    E, norms = ops.foreach_perturb(*lists([tiny, make_pair(4, 9, 8, 2)]), RHO)
    assert norms.dtype == torch.float32 and float(norms[0]) == 0 and not bool(E[0].any())
    E, norms = ops.foreach_perturb(*lists([tiny]), RHO)
    assert norms.dtype == torch.float64 and float(norms[0]) > 0 and bool(E[0].any())


def test_tensors_without_a_kernel_are_refused_in_words():
    pair = make_pair(5, 9, 8, 2)
    sparse = [t.to_sparse() for t in pair[:4]]
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for call in (
        lambda: ops.perturb(*sparse, 2.0, RHO),
        lambda: ops.foreach_perturb(*([t] for t in sparse), [2.0], RHO),
        lambda: ops.foreach_bound([sparse[0]], [sparse[1]], [2.0], RHO),
        lambda: ops.foreach_perturb_ema_(
            *([t] for t in sparse), [], [sparse[1]], skipped.to_sparse(), [2.0], RHO, 0.9
        ),
        lambda: ops.foreach_adamw_step_(
            **mapped(random_call([make_pair(5, 9, 8, 2)]), torch.Tensor.to_sparse)
        ),
    ):
        with pytest.raises(RuntimeError, match="must be a dense tensor"):
            call()
