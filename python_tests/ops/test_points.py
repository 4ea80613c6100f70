"""The in-place operators form the point of the gradients, ``(factor + E).to(factor.dtype)``,
themselves: their results are those of factors that hold these values already."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from adamw_case import FOR_AVERAGES, adds_averages, copied, random_call
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ADDED,
    DTYPES,
    HOST_CUDA,
    ONTO,
    Pair,
    all_same_bits,
    cpu_only,
    lists,
    make_pair,
    ontos,
    pairs,
    points,
    same_bits,
    scopes,
    seeds,
)
from torch import Tensor

ops = torch.ops.eflat
every_kind = pytest.mark.parametrize("kind", ADDED)
kinds = st.sampled_from(ADDED)


def averages_of(call: dict[str, Any]) -> tuple[Tensor, list[Tensor], int]:
    """The norms, averages and counter that a call of foreach_perturb_ema_ gives."""
    call = {name: call[name] for name in (*FOR_AVERAGES, "onto", "norm_scope")}
    norms = ops.foreach_perturb_ema_(**call)
    return norms, call["ema"], int(call["skipped"])


def at_the_point(call: dict[str, Any]) -> dict[str, Any]:
    """The call with factors that hold the point's values, and nothing added to them."""
    call = copied(call)
    given = [Pair(*row) for row in zip(*(call[name] for name in Pair._fields), strict=True)]
    there = lists(points(given, call["E"], call["onto"]))
    return {**call, **dict(zip(Pair._fields, there, strict=True)), "E": []}


def amid_nans(call: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Tensor, int]]]:
    """The call with averages at odd addresses, and the frames of NaNs that they lie in."""
    frames = [(torch.full((t.numel() + 20,), math.nan, dtype=t.dtype), t) for t in call["ema"]]
    inside = [frame[3 : 3 + t.numel()].view(t.shape).copy_(t) for frame, t in frames]
    other = {
        **call,
        "ema": inside,
        "E": inside if adds_averages(call) else call["E"],
    }
    return other, [(frame, t.numel()) for frame, t in frames]


def check(given: list[Pair], onto: str, norm_scope: str, kind: str, seed: int = 0) -> None:
    call = random_call(given, onto, norm_scope, seed, kind)
    expected = averages_of(at_the_point(call))
    before = copied(call)
    call, frames = amid_nans(call)
    norms, ema, skipped = averages_of(call)
    assert same_bits(norms, expected[0]) and skipped == expected[2]
    assert all_same_bits(ema, expected[1])
    assert all_same_bits(call["A"] + call["B"], before["A"] + before["B"])
    for frame, size in frames:
        assert bool(frame[:3].isnan().all()) and bool(frame[3 + size :].isnan().all())


@given(st.lists(pairs(), min_size=1, max_size=4), ontos, scopes, kinds, seeds)
def test_mixed_lists(given: list[Pair], onto: str, norm_scope: str, kind: str, seed: int) -> None:
    check(given, onto, norm_scope, kind, seed)


@every_kind
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("n, m, r", [(1300, 5, 4), (5, 1100, 16), (700, 600, 33), (300, 290, 256)])
def test_more_than_one_block(n: int, m: int, r: int, onto: str, norm_scope: str, kind: str) -> None:
    check([make_pair(n + r, n, m, r)], onto, norm_scope, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("onto", ONTO)
def test_every_rank(dtype: torch.dtype, onto: str) -> None:
    """Vectors of rows that are read to the end of a matrix, and not beyond."""
    seed = int(torch.randint(2**31, ()))
    given = [make_pair(seed + r, 20 + r, 51 - r, r, dtype) for r in range(1, 34)]
    both = ("average", "own")
    for kind in [both[seed % 2]] if HOST_CUDA else both:
        check(given, onto, "layer", kind, seed)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("onto", ONTO)
def test_ill_conditioned_factors(onto: str, dtype: torch.dtype, kind: str) -> None:
    """A second pass over the point; as small an E leaves it ill-conditioned."""
    for seed in torch.randint(2**31, (3,)).tolist():
        given = [make_pair(seed, 60, 70, 9, dtype, 1e3, 1e4), make_pair(seed, 900, 30, 5, dtype)]
        call = random_call(given, onto, "layer", seed, kind)
        for e in call["ema"]:
            e.mul_(1e-6)
        expected = averages_of(at_the_point(call))
        result = averages_of(call)
        assert same_bits(result[0], expected[0]) and all_same_bits(result[1], expected[1])


@every_kind
@pytest.mark.parametrize("onto", ONTO)
def test_factors_of_zeros(onto: str, kind: str) -> None:
    given = [make_pair(1, 40, 30, 5), make_pair(2, 600, 30, 4, torch.bfloat16)]
    for pair in given:
        pair.B.zero_()
    check(given, onto, "layer", kind)


@every_kind
@pytest.mark.parametrize("name", ["A", "B", "grad_B", "E"])
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ONTO)
def test_a_bad_pair_spoils_no_other(onto: str, norm_scope: str, name: str, kind: str) -> None:
    call = random_call([make_pair(seed, 30, 20, 4) for seed in range(3)], onto, norm_scope, 0, kind)
    if name == "E" and kind in ("zeros", "nothing"):
        return
    call[name][1][2, 1] = math.nan
    alone = {
        n: [x for i, x in enumerate(v) if i % 3 != 1] if isinstance(v, list) else v
        for n, v in copied(call).items()
    }
    old = [t.clone() for t in call["ema"][1::3]]
    norms, ema, skipped = averages_of(call)
    assert norms[1].isnan() and skipped == 4 and all_same_bits(ema[1::3], old)
    norms_alone, ema_alone, _ = averages_of(alone)
    assert same_bits(norms[::2], norms_alone)
    assert all_same_bits([x for i, x in enumerate(ema) if i % 3 != 1], ema_alone)


def test_sums_are_rounded_as_torch_rounds_them() -> None:
    """Ties, numbers below the normal ones, overflow: the norm of a column of B's point says."""
    for dtype in DTYPES:
        for exponent in (-26.0, -17.0, -3.0, 0.0, 9.0, 15.9):
            g = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
            B = (torch.randn(400, 3, generator=g) * 2.0**exponent).to(dtype)
            spacing = torch.finfo(dtype).eps * 2.0**exponent
            steps = torch.randint(-9, 10, B.shape, generator=g) * spacing / 4
            E = steps.to(torch.float64 if dtype == torch.float64 else torch.float32)
            pair = make_pair(1, 400, 20, 3, dtype)._replace(B=B)
            call = random_call([pair])
            call["E"] = [E]
            expected = averages_of(at_the_point(call))
            result = averages_of(call)
            assert same_bits(result[0], expected[0]), (dtype, exponent)
            assert same_bits(result[1][0], expected[1][0]), (dtype, exponent)


@cpu_only
@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("count", [1, 9])
def test_threads_that_write_averages_while_others_read_them(
    count: int, onto: str, norm_scope: str
) -> None:
    given = [make_pair(seed, 2100, 1700, 5 + seed % 4) for seed in range(count)]
    call = random_call(given, onto, norm_scope, 0, "average")
    expected = averages_of(at_the_point(call))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            result = averages_of(copied(call))
        finally:
            torch.set_num_threads(1)
        assert same_bits(result[0], expected[0]) and all_same_bits(result[1], expected[1])


def check_every_dtype() -> None:
    for onto in ONTO:
        for r in (1, 2, 3, 4, 8, 17):
            given = [make_pair(i, 40 + 67 * r, 300 - 3 * r, r, t) for i, t in enumerate(DTYPES)]
            for kind in ADDED:
                check(given, onto, "global", kind)


@cpu_only
@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instructions: str) -> None:
    # One that this processor or build lacks falls back to the baseline.
    subprocess.run(
        [sys.executable, "-c", "import test_points; test_points.check_every_dtype()"],
        env={**os.environ, "EFLAT_CPU": instructions, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=120,
    )


def test_tensors_that_are_copied_on_write() -> None:
    """Averages get memory of their own when they are written, and what was added is read there."""
    for kind in ("average", "own"):
        call = random_call([make_pair(seed, 20, 30, 3) for seed in range(2)], "both", kind=kind)
        expected = averages_of(copied(call))
        lazy = [torch._lazy_clone(t) for t in call["ema"]]
        E = lazy if kind == "average" else [torch._lazy_clone(t) for t in call["E"]]
        result = averages_of({**call, "ema": lazy, "E": E})
        assert same_bits(result[0], expected[0]) and all_same_bits(result[1], expected[1])
