"""Wrong calls end in an error that names the argument, what was given and what was expected.

``eflat_ext.perturb`` and ``foreach_perturb`` raise TypeError and ValueError; ``torch.ops.eflat.*``
the same message as RuntimeError, since the stable ABI knows no other. Nothing is modified then.
"""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import RHO, Pair, lists, make_pair, same_bits

import eflat_ext
from eflat_ext.ops import checks

ops = torch.ops.eflat
R, M, N = 3, 11, 9


def valid() -> Pair:
    return make_pair(0, N, M, R)


# (argument, wrong value, error, what its message says beside the name of the argument)
TENSOR_ERRORS = [
    ("A", None, TypeError, "tensor.*NoneType"),
    ("B", 1.5, TypeError, "tensor.*float"),
    ("grad_A", "x", TypeError, "tensor.*str"),
    ("A", torch.ones(M), ValueError, r"2-d.*\(11,\)"),
    ("B", torch.ones(2, N, R), ValueError, r"2-d.*\(2, 9, 3\)"),
    ("B", torch.ones(N, R + 1), ValueError, r"\(n, r\).*\(3, 11\).*\(9, 4\)"),
    ("grad_A", torch.ones(R, M + 1), ValueError, r"shape of A.*\(3, 11\).*\(3, 12\)"),
    ("grad_A", torch.ones(M, R), ValueError, r"shape of A.*\(3, 11\).*\(11, 3\)"),
    ("grad_B", torch.ones(R, N), ValueError, r"shape of B.*\(9, 3\).*\(3, 9\)"),
    ("grad_B", torch.ones(N * R), ValueError, r"shape of B.*\(9, 3\).*\(27,\)"),
    ("A", torch.ones(R, M, dtype=torch.int32), TypeError, "float64, float32, bfloat16 or float16"),
    ("B", torch.ones(N, R, dtype=torch.complex64), TypeError, "float64, float32|dtype of A"),
    ("B", torch.ones(N, R, dtype=torch.float64), TypeError, "dtype of A.*float32.*float64"),
    ("grad_A", torch.ones(R, M).bfloat16(), TypeError, "dtype of A.*float32.*bfloat16"),
    ("grad_B", torch.ones(N, R).half(), TypeError, "dtype of .*float32.*float16"),
    ("A", torch.ones(R, M).to_sparse(), TypeError, "dense"),
    ("grad_B", torch.ones(N, R).to_sparse_csr(), TypeError, "dense"),
    ("B", torch.ones(N, R, device="meta"), ValueError, "device"),
    ("grad_A", torch.ones(R, M, device="meta"), ValueError, "device"),
]
SCALING_ERRORS = [
    ("scaling", 0.0, ValueError, "finite and not 0.*0"),
    ("scaling", math.nan, ValueError, "finite and not 0.*nan"),
    ("scaling", math.inf, ValueError, "finite and not 0.*inf"),
    ("scaling", None, TypeError, "number.*NoneType"),
    ("scaling", "x", TypeError, "number.*str"),
]
OPTION_ERRORS = [
    ("rho", -0.1, ValueError, "at least 0.*-0.1"),
    ("rho", math.nan, ValueError, "finite.*nan"),
    ("rho", math.inf, ValueError, "finite.*inf"),
    ("rho", "x", TypeError, "number.*str"),
    ("rho", None, TypeError, "number.*NoneType"),
    ("onto", "C", ValueError, "'B', 'A' or 'both'.*'C'"),
    ("onto", "", ValueError, "'B', 'A' or 'both'"),
    ("onto", None, (TypeError, ValueError), "'B', 'A' or 'both'.*None"),
    ("rtol", 1e-8, ValueError, r"\[1e-07, 1\).*1e-08"),
    ("rtol", 1.0, ValueError, r"\[1e-07, 1\).*1"),
    ("rtol", -1e-3, ValueError, r"\[1e-07, 1\)"),
    ("rtol", math.nan, ValueError, r"\[1e-07, 1\).*nan"),
    ("rtol", "x", TypeError, "number.*str"),
]
ONE_FACTOR_ERRORS = [  # of perturb alone, which gives one E
    ("onto", "both", ValueError, "'B' or 'A'.*'both'.*foreach_perturb"),
]
SCOPE_ERRORS = [
    ("norm_scope", "both", ValueError, "'layer' or 'global'.*'both'"),
    ("norm_scope", None, (TypeError, ValueError), "'layer' or 'global'.*None"),
]
LIST_ERRORS = [
    ("B", [], ValueError, "one entry per pair, 2, got 0"),
    ("grad_A", [torch.ones(R, M)] * 3, ValueError, "one entry per pair, 2, got 3"),
    ("scaling", [1.0], ValueError, "one entry per pair, 2, got 1"),
    ("A", None, TypeError, "list.*NoneType"),
    ("grad_B", 3, TypeError, "list.*int"),
    ("scaling", 2.0, TypeError, "list.*float"),
    ("A", torch.ones(2, R, M), TypeError, "list.*Tensor"),
]


def describe(error) -> str:
    name, value = error[:2]
    if isinstance(value, torch.Tensor):
        value = f"{value.dtype}{tuple(value.shape)}{value.device.type}{value.layout}"
    return f"{name}={str(value)[:40]}"


def named(index: str, name: str) -> str:
    """The argument's name as a word, with its index in a list."""
    return rf"(?s)\b{name}{re.escape(index)}(?![\w]).*"


def arguments(pair: Pair, **changed) -> dict:
    return {**pair._asdict(), "rho": RHO, "onto": "B", "rtol": None, **changed}


def list_arguments(*pairs: Pair, **changed) -> dict:
    columns = dict(zip(Pair._fields, lists(list(pairs)), strict=True))
    return {**columns, "rho": RHO, "onto": "B", "norm_scope": "layer", "rtol": None, **changed}


def cases(*tables):
    rows = [row for table in tables for row in table]
    return pytest.mark.parametrize("name, value, error, says", rows, ids=map(describe, rows))


def check_operator(op, call: dict, name: str, says: str) -> None:
    # Layouts and devices are refused by the dispatcher, in its own words, or by a fake kernel.
    own_words = says not in ("dense", "device")
    with pytest.raises(
        RuntimeError if own_words else (RuntimeError, ValueError),
        match=rf"(?s)\b{name}\b" if own_words else "",
    ):
        op(**call)


@cases(TENSOR_ERRORS, SCALING_ERRORS, OPTION_ERRORS, ONE_FACTOR_ERRORS)
def test_perturb(name, value, error, says):
    call = arguments(valid(), **{name: value})
    with pytest.raises(error, match=named("", name) + says):
        eflat_ext.perturb(**call)
    check_operator(ops.perturb, call, name, says)


@cases(TENSOR_ERRORS, SCALING_ERRORS)
@pytest.mark.parametrize("onto", ["B", "both"])
def test_foreach_perturb_names_the_entry(onto, name, value, error, says):
    call = list_arguments(valid(), valid()._replace(**{name: value}), valid(), onto=onto)
    with_index = says.replace("of A", r"of A\[[01]\]").replace("of B", r"of B\[1\]")
    with pytest.raises(error, match=named("[1]", name) + with_index):
        eflat_ext.foreach_perturb(**call)
    check_operator(ops.foreach_perturb, call, name, says)


@cases(OPTION_ERRORS, SCOPE_ERRORS, LIST_ERRORS)
def test_foreach_perturb(name, value, error, says):
    call = list_arguments(valid(), valid(), **{name: value})
    with pytest.raises(error, match=named("", name) + says):
        eflat_ext.foreach_perturb(**call)
    check_operator(ops.foreach_perturb, call, name, says)


def test_ranks_and_empty_factors():
    call = (torch.ones(0, 4), torch.ones(5, 0), torch.ones(0, 4), torch.ones(5, 0), 1.0, RHO)
    with pytest.raises(ValueError, match=r"rank of A.* at least 1, got 0"):
        eflat_ext.perturb(*call)
    with pytest.raises(RuntimeError, match=r"rank of A.* got 0"):
        ops.perturb(*call)
    for n, m in ((0, 4), (4, 0)):
        call = (torch.ones(2, m), torch.ones(n, 2), torch.ones(2, m), torch.ones(n, 2), 1.0, RHO)
        with pytest.raises(ValueError, match="must not be empty"):
            eflat_ext.perturb(*call)
        with pytest.raises(RuntimeError, match="must not be empty"):
            ops.perturb(*call)


def test_options_of_empty_lists_are_checked_too():
    for name, value, error, _ in (*OPTION_ERRORS, *SCOPE_ERRORS):
        call = list_arguments(valid(), **{name: value})
        call.update({field: [] for field in Pair._fields})
        with pytest.raises(error, match=name):
            eflat_ext.foreach_perturb(**call)


@pytest.mark.parametrize(
    "check, right, wrong",
    [
        (checks.check_rho, (0, 0.05, np.float32(2), torch.tensor(0.5)), (-1, math.nan, 10**400)),
        (checks.check_rtol, (None, 1e-7, 0.5), (1e-8, 1.0, math.nan)),
        (checks.check_beta, (0, 0.9, True), (-0.1, 1.1, math.inf)),
        (partial(checks.check_beta, positive=True), (1e-9, 1), (0.0, -1)),
        (checks.check_onto, ("A", "B", "both"), ("C", "b", "", None)),
        (checks.check_norm_scope, ("layer", "global"), ("both", None)),
    ],
    ids=["rho", "rtol", "beta", "positive beta", "onto", "norm_scope"],
)
def test_options_are_checked_one_by_one(check, right, wrong):
    for value in right:
        check(value)
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\w+ must be .*, got {re.escape(repr(value))[:20]}"):
            check(value)
    if check not in (checks.check_onto, checks.check_norm_scope):
        for value in ("0.5", b"1", 1j, [0.1], torch.ones(2), object):
            with pytest.raises(TypeError, match=rf"must be a number, got {type(value).__name__}"):
                check(value)


def test_an_option_goes_by_another_name():
    assert checks.check_rho(2, "radius") == 2.0
    with pytest.raises(ValueError, match="radius must be finite and at least 0, got -2"):
        checks.check_rho(-2, "radius")


def test_errors_while_tracing():
    # The fake kernels check what the kernels check: a wrong shape is found when it is traced.
    meta = {name: t.to("meta") for name, t in valid()._asdict().items() if name != "scaling"}
    for changed, error in (
        ({"onto": "C"}, ValueError),
        ({"onto": "both"}, ValueError),
        ({"rtol": 2.0}, ValueError),
        ({"grad_A": torch.ones(R, M + 1, device="meta")}, ValueError),
        ({"B": torch.ones(N, R + 1, device="meta")}, ValueError),
        ({"B": torch.ones(N, R, device="meta", dtype=torch.float64)}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(changed))):
            eflat_ext.perturb(**arguments(valid(), **{**meta, **changed}))


# The in-place operators: errors, and nothing modified by them.


def average_arguments() -> dict:
    pairs = [valid(), make_pair(1, 5, 6, 2)]
    return {
        **{key: value for key, value in list_arguments(*pairs).items() if key != "scaling"},
        "scaling": [2.0, 1.0],
        "E": [torch.zeros(N, R), torch.ones(5, 2)],
        "ema": [torch.ones(N, R), torch.ones(5, 2)],
        "skipped": torch.tensor(7),
        "beta": 0.9,
    }


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"beta": -0.1}, "beta must be in .*-0.1"),
        ({"beta": 1.1}, "beta must be in .*1.1"),
        ({"beta": math.nan}, "beta must be in .*nan"),
        ({"rho": -1.0}, "rho must be"),
        ({"onto": "A"}, r"ema\[0\] must have the shape of A\[0\]"),
        ({"onto": "both"}, "ema must have two entries per pair, all A and all B, 4, got 2"),
        ({"skipped": torch.tensor(7.0)}, "skipped must be an int64 tensor"),
        ({"skipped": torch.tensor([7])}, "skipped must be an int64 tensor"),
        ({"ema": [torch.ones(N, R)]}, "ema must have one entry per pair, 2, got 1"),
        ({"ema": [torch.ones(N, R), torch.ones(2, 5)]}, r"ema\[1\] must have the shape of B\[1\]"),
        ({"ema": [torch.ones(N, R), torch.ones(5, 2).double()]}, r"ema\[1\] must be float32"),
        ({"ema": [torch.ones(N, R).half(), torch.ones(5, 2)]}, r"ema\[0\] must be float32"),
        ({"ema": [torch.ones(N, R), torch.ones(2, 5).T]}, r"ema\[1\] must be contiguous"),
        ({"E": [torch.ones(N, R)]}, "E must have one entry per pair, 2, got 1"),
        ({"E": [torch.ones(N, R), torch.ones(2, 5)]}, r"E\[1\] must have the shape of B\[1\]"),
        ({"E": [torch.ones(N, R), torch.ones(5, 2).double()]}, r"E\[1\] must be float32"),
        ({"E": [torch.ones(N, R).half(), torch.ones(5, 2)]}, r"E\[0\] must be float32 for float32"),
        ({"grad_B": [torch.ones(N, R), torch.ones(5, 3)]}, r"grad_B\[1\] must have the shape"),
        ({"scaling": [1.0, 0.0]}, r"scaling\[1\] must be finite and not 0"),
    ],
    ids=str,
)
def test_moving_average(changed, says):
    call = {**average_arguments(), **changed}
    before = [t.clone() for t in [*call["ema"], call["skipped"]]]
    with pytest.raises(RuntimeError, match=says):
        ops.foreach_perturb_ema_(**call)
    for t, old in zip([*call["ema"], call["skipped"]], before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"B": [torch.ones(N, R + 1)]}, r"B\[0\] must be \(n, r\)"),
        ({"B": []}, "B must have one entry per pair, 1, got 0"),
        ({"scaling": [0.0]}, r"scaling\[0\] must be finite"),
        ({"scaling": []}, "scaling must have one entry"),
        ({"ema": [torch.ones(R, M, dtype=torch.int64)]}, r"ema\[0\] must be float64"),
        ({"ema": [torch.ones(M)]}, r"B\[0\] must be \(n, r\)|ema\[0\]"),
        (
            {"ema": [torch.ones(R, M, device="meta")]},
            r"B\[0\] must be on the device of ema\[0\], meta, got cpu",
        ),
        (
            {"B": [torch.ones(N, R, device="meta")]},
            r"B\[0\] must be on the device of ema\[0\], cpu, got meta",
        ),
        ({"rho": math.nan}, "rho must be finite"),
        ({"norm_scope": "x"}, "norm_scope must be"),
        ({"ema": [torch.ones(0, M)], "B": [torch.ones(N, 0)]}, r"rank of ema\[0\]"),
        ({"ema": [torch.ones(R, 0)]}, r"ema\[0\] and B\[0\] must not be empty"),
        ({"B": [torch.ones(0, R)]}, r"ema\[0\] and B\[0\] must not be empty"),
    ],
    ids=str,
)
def test_bound(changed, says):
    call = {"ema": [torch.ones(R, M)], "B": [torch.ones(N, R)], "scaling": [1.0], "rho": RHO}
    assert ops.foreach_bound(**call).shape == (1,)
    with pytest.raises((RuntimeError, ValueError), match=says):
        ops.foreach_bound(**{**call, **changed})


def freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)  # as FSDP does between uses
    return t


def test_freed_storage():
    for name in ("A", "B", "grad_A", "grad_B"):
        call = arguments(valid(), **{name: freed(getattr(valid(), name))})
        with pytest.raises(ValueError, match=f"{name} must lie within its storage.* 0 bytes"):
            eflat_ext.perturb(**call)
        with pytest.raises(RuntimeError, match=f"{name} must lie within its storage.* 0 bytes"):
            ops.perturb(**call)


def of_inference(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


def quantized_to_4_bits(t: torch.Tensor) -> torch.Tensor:
    rows = len(t)
    return torch.quantize_per_channel(t, torch.ones(rows), torch.zeros(rows), 0, torch.quint4x2)


READ_OR_WRITTEN = {
    "sparse": (torch.Tensor.to_sparse, "dense"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantized"),
    "of 4 bits": (quantized_to_4_bits, "quantized"),
    "of 3 bits": (lambda t: torch.empty(t.shape, dtype=torch.uint3), "float"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), "NestedTensor"),  # torch's own words
    "freed": (freed, "must lie within its storage"),
}
WRITTEN = {
    "of inference": (of_inference, "must not be an inference tensor outside InferenceMode"),
    "negated": (torch._neg_view, "must hold its values as they are"),
    "recorded by autograd": (torch.Tensor.requires_grad_, "must not require a gradient"),
}


@pytest.mark.filterwarnings("ignore:.*(nested|[Qq]uantiz)")
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("grad_B", "E") for kind in READ_OR_WRITTEN]
    + [("ema", kind) for kind in (*READ_OR_WRITTEN, *WRITTEN)],
)
def test_odd_tensors_are_named_and_nothing_changes(name, kind):
    make, says = {**READ_OR_WRITTEN, **WRITTEN}[kind]
    call = average_arguments()
    call[name][1] = make(call[name][1].clone())
    where = "" if kind == "nested" else rf"{name}\[1\] .*"
    with pytest.raises(RuntimeError, match=where + says):
        ops.foreach_perturb_ema_(**call)
    assert torch.equal(call["ema"][0], torch.ones(N, R)) and int(call["skipped"]) == 7


@pytest.mark.parametrize(
    "skipped",
    [None, torch._neg_view(torch.tensor(7)), of_inference(torch.tensor(7))],
    ids=["None", "negated", "of inference"],
)
def test_odd_counters(skipped):
    call = {**average_arguments(), "skipped": skipped}
    with pytest.raises(RuntimeError, match="skipped must"):
        ops.foreach_perturb_ema_(**call)
    assert all(bool((t == 1).all()) for t in call["ema"])


def test_inference_tensors_are_written_within_inference_mode():
    """Torch's own operators do; alone or beside others, whose versions are raised."""
    call, other = average_arguments(), average_arguments()
    norms = ops.foreach_perturb_ema_(**other)
    with torch.inference_mode():
        call["ema"][1] = call["ema"][1].clone()
        assert torch.equal(ops.foreach_perturb_ema_(**call), norms)
        every = {n: [t.clone() for t in v] if n == "ema" else v for n, v in call.items()}
        ops.foreach_perturb_ema_(**every)
    for x, y in zip(call["ema"], other["ema"], strict=True):
        assert torch.equal(x, y)
    assert call["ema"][0]._version > 0


# Calls at random.

tensors = st.builds(
    lambda shape, dtype, sign: (torch.rand(shape) + 0.1).mul(sign).to(dtype),
    st.one_of(
        st.sampled_from([(R, M), (N, R), (M, R), (R, R), (0, M), (N, 0), (N,), ()]),
        st.lists(st.integers(0, 12), max_size=3).map(tuple),
    ),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool]),
    st.sampled_from([1.0, -1.0]),
)
anything = st.one_of(
    tensors,
    st.none(),
    st.text(max_size=3),
    st.integers(-3, 3),
    st.floats(),
    st.booleans(),
    st.lists(st.one_of(tensors, st.none(), st.floats(), st.text(max_size=2)), max_size=3),
)


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from([*Pair._fields, "rho", "onto", "rtol"]), anything, max_size=3)
)
def test_random_calls_of_perturb(changed):
    call = arguments(valid(), **changed)
    before = valid()
    try:
        E, _ = eflat_ext.perturb(**call)
    except (TypeError, ValueError) as error:
        assert any(re.search(rf"\b{name}\b", str(error)) for name in (*changed, "A", "B"))
        with pytest.raises(RuntimeError):
            ops.perturb(**call)
    else:
        assert bool(E.isfinite().all())
    for name, t in before._asdict().items():
        if name != "scaling" and name not in changed:
            assert same_bits(call[name], t)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*Pair._fields, "rho", "onto", "norm_scope", "rtol"]),
        st.one_of(anything, st.lists(tensors, min_size=2, max_size=2)),
        max_size=3,
    )
)
def test_random_calls_of_foreach_perturb(changed):
    call = list_arguments(valid(), make_pair(1, N, M, R), **changed)
    try:
        E, norms = eflat_ext.foreach_perturb(**call)
    except (TypeError, ValueError) as error:
        # Lists of another length than a changed A: the error may name one that was not changed.
        assert any(re.search(rf"\b{name}\b", str(error)) for name in (*changed, *Pair._fields))
        with pytest.raises(RuntimeError):
            ops.foreach_perturb(**call)
    else:
        assert all(bool(e.isfinite().all()) for e in E) and len(E) == len(norms)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(sorted(average_arguments())),
        st.one_of(anything, st.lists(tensors, min_size=2, max_size=2)),
        min_size=1,
        max_size=2,
    )
)
def test_random_calls_of_the_moving_average(changed):
    call = {**average_arguments(), **changed}
    watched = average_arguments()["ema"]
    try:
        ops.foreach_perturb_ema_(**call)
    except RuntimeError:
        if "ema" not in changed:
            assert all(torch.equal(t, old) for t, old in zip(call["ema"], watched, strict=True))
        if "skipped" not in changed:
            assert int(call["skipped"]) == 7
