"""``foreach_adamw_step_`` against ``foreach_perturb_ema_`` and ``torch.optim.AdamW``."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adamw_case import (
    FOR_AVERAGES,
    WRITTEN,
    adds_averages,
    assert_same,
    assert_stepped,
    copied,
    on_meta,
    one_after_another,
    random_call,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    ADDED,
    DEVICE,
    DTYPES,
    ONTO,
    Pair,
    all_same_bits,
    error,
    make_pair,
    moved,
    ontos,
    pairs,
    same_bits,
    scopes,
    seeds,
)
from torch import Tensor, nn

ops = torch.ops.eflat


def check(call: dict[str, Any]) -> None:
    expected, norms = one_after_another(call)
    before = copied(call)
    assert same_bits(ops.foreach_adamw_step_(**call), norms)
    assert_same(call, expected, ("ema", "step"))
    if not adds_averages(call):
        assert_same(call, before, ("E",))
    assert_same(call, before, ("grad_A", "grad_B"))
    assert_stepped(call, expected, ("A", "B", "exp_avg", "exp_avg_sq"), 1e-12)


@given(st.lists(pairs(), min_size=1, max_size=4), ontos, scopes, seeds, st.sampled_from(ADDED))
def test_mixed_lists(given: list[Pair], onto: str, norm_scope: str, seed: int, kind: str) -> None:
    check(random_call(given, onto, norm_scope, seed, kind))


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("n, m, r", [(1300, 5, 4), (5, 1100, 16), (700, 600, 33), (300, 290, 256)])
def test_more_than_one_block(n: int, m: int, r: int, onto: str, norm_scope: str) -> None:
    for kind in ADDED:
        check(random_call([make_pair(n + r, n, m, r)], onto, norm_scope, r, kind))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="about CUDA graphs")
def test_a_graph_needs_steps_on_the_device() -> None:
    call = random_call([make_pair(seed, 20, 30, 3) for seed in range(2)], "B")
    on_host = call.pop("step")
    call = {name: moved(value, DEVICE) for name, value in call.items()}
    before = copied(call)
    graph, other = torch.cuda.CUDAGraph(), torch.zeros(1, device=DEVICE)
    with torch.cuda.graph(graph):
        other.add_(1)
        with pytest.raises(RuntimeError, match="step of pair 0 is on the CPU"):
            ops.foreach_adamw_step_(**call, step=on_host)
    graph.replay()
    assert_same(call, before, [name for name in WRITTEN if name != "step"])


def test_the_first_step_starts_from_moments_of_zero() -> None:
    call = random_call([make_pair(1, 30, 20, 4, torch.float64)])
    for t in [*call["exp_avg"], *call["exp_avg_sq"], *call["step"]]:
        t.zero_()
    check(call)


# torch's bits. Its square root on the CPU is MKL's, a unit in the last place off for a fifth of all
# float32 numbers; with one that is rounded as IEEE 754 says, parameters are equal, too.

SAME_INSTRUCTIONS = (
    DEVICE.type == "cpu"
    and not {"EFLAT_CPU", "EFLAT_TEST_KERNELS"} & set(os.environ)
    and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
)


def exact_root(t: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(t.detach().numpy()))


@pytest.mark.parametrize("root", ["exact", "torch's"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_without_radius_is_torch_s(
    dtype: torch.dtype, foreach: bool, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if root == "exact":
        monkeypatch.setattr(Tensor, "sqrt", exact_root)
        monkeypatch.setattr(torch, "_foreach_sqrt", lambda tensors: [*map(exact_root, tensors)])
    for n, m, r in ((1, 1, 1), (5, 7, 3), (33, 65, 8), (257, 1031, 5), (3, 700, 17)):
        call = random_call([make_pair(n, n, m, r, dtype)])
        call.update(rho=0.0, ema=[torch.zeros_like(t) for t in call["B"]])
        call["E"] = call["ema"]
        for t in [*call["exp_avg"], *call["exp_avg_sq"], *call["step"]]:
            t.zero_()
        parameters = [nn.Parameter(t.clone()) for t in call["A"] + call["B"]]
        groups = [
            {"params": [p], "betas": (call["beta1"][i], call["beta2"][i])}
            | {name: call[name][i] for name in ("lr", "eps", "weight_decay")}
            for i, p in enumerate(parameters)
        ]
        adamw = torch.optim.AdamW(groups, foreach=foreach)
        for _ in range(6):
            for p, t in zip(parameters, call["grad_A"] + call["grad_B"], strict=True):
                p.grad = t.normal_().clone()
            before = [p.detach().clone() for p in parameters]
            adamw.step()
            ops.foreach_adamw_step_(**call)
            assert not call["ema"][0].any()
            for i, (p, x) in enumerate(zip(parameters, call["A"] + call["B"], strict=True)):
                state = adamw.state[p]
                moments = [(call[name][i], state[name]) for name in ("exp_avg", "exp_avg_sq")]
                eps = torch.finfo(dtype).eps
                if SAME_INSTRUCTIONS:
                    assert all(same_bits(*both) for both in moments)
                    assert root != "exact" or same_bits(x, p.detach())
                else:
                    assert all(error(*both) <= 4 * eps for both in moments)
                step = (p.detach() - before[i]).abs() + call["lr"][i] * call["weight_decay"][i]
                allowed = eps * (p.detach().abs() + 8 * step)
                assert bool(((x - p.detach()).abs() <= allowed).all())
                x.copy_(p.detach())
                for mine, other in moments:
                    mine.copy_(other)


def check_every_dtype() -> None:
    for onto in ONTO:
        for r in (1, 3, 8, 17):
            given = [make_pair(i, 40 + 67 * r, 300 - 3 * r, r, t) for i, t in enumerate(DTYPES)]
            check(random_call(given, onto, "global", seed=r))


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instructions: str) -> None:
    # One that this processor or build lacks falls back to the baseline.
    subprocess.run(
        [sys.executable, "-c", "import test_fused_step; test_fused_step.check_every_dtype()"],
        env={**os.environ, "EFLAT_CPU": instructions, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=120,
    )


# Bad pairs.


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_bad_pairs_are_stepped_and_not_averaged(
    onto: str, bad: float, dtype: torch.dtype, norm_scope: str
) -> None:
    given = [make_pair(seed, 30, 20, 4, dtype) for seed in range(3)]
    for gradient in (given[1].grad_A, given[1].grad_B):
        if bad == 0:
            gradient.zero_()
        else:
            gradient[3, 1] = bad
    call = random_call(given, onto, norm_scope)

    def others(value: Any) -> Any:  # than those of the bad pair
        if not isinstance(value, list):
            return value
        return [x for i, x in enumerate(value) if i % 3 != 1]

    alone = copied({name: others(value) for name, value in call.items()})
    average = [t.clone() for t in call["ema"][1::3]]
    check(call)
    assert int(call["skipped"]) == 4
    assert all_same_bits(call["ema"][1::3], average)
    assert int(call["A"][1].isnan().sum()) == (0 if bad == 0 else 1)
    ops.foreach_adamw_step_(**alone)
    assert_same({name: others(call[name]) for name in WRITTEN}, alone, ("A", "B", "ema"))


# Memory that is written, and memory that is not.


@given(st.lists(pairs(), min_size=1, max_size=3), ontos, seeds, st.integers(0, 9))
def test_nothing_beside_the_tensors_is_written(
    given: list[Pair], onto: str, seed: int, offset: int
) -> None:
    """Tensors at odd addresses amid NaNs: the same bits, and every NaN is still there."""
    call = random_call(given, onto, "layer", seed)
    amid = copied(call)
    frames = []
    for name in (*WRITTEN, "E"):
        for i, t in enumerate(amid[name]):
            frame = torch.full((t.numel() + 20,), math.nan, dtype=t.dtype)
            inside = frame[offset : offset + t.numel()].view(t.shape)
            amid[name][i] = inside.copy_(t)
            frames.append((frame, t.numel()))
    norms = ops.foreach_adamw_step_(**call)
    assert same_bits(ops.foreach_adamw_step_(**amid), norms)
    assert_same(amid, call)
    for frame, size in frames:
        assert bool(frame[:offset].isnan().all()) and bool(frame[offset + size :].isnan().all())


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.parametrize("count", [1, 7])
def test_threads_make_no_difference(count: int, onto: str, norm_scope: str) -> None:
    given = [make_pair(seed, 1200, 700, 5 + seed) for seed in range(count)]
    results = []
    for threads in (1, 2, 3, 1):
        call = random_call(given, onto, norm_scope, kind="average")
        torch.set_num_threads(threads)
        try:
            norms = ops.foreach_adamw_step_(**call)
        finally:
            torch.set_num_threads(1)
        results.append([norms, *(t for name in WRITTEN for t in call[name])])
    for other in results[1:]:
        assert all_same_bits(other, results[0])


@pytest.mark.parametrize("onto", ["B", "both"])
def test_what_is_read_may_have_any_strides(onto: str) -> None:
    call = random_call([make_pair(1, 30, 20, 4)], onto)
    strided = copied(call)
    for name in ("grad_A", "grad_B", "E"):
        strided[name] = [t.T.contiguous().T for t in strided[name]]
        assert not strided[name][0].is_contiguous()
    ops.foreach_adamw_step_(**call)
    ops.foreach_adamw_step_(**strided)
    assert_same(call, strided)


# The operator in PyTorch.


@pytest.mark.parametrize("onto", ONTO)
def test_no_pairs(onto: str) -> None:
    call = random_call([make_pair(1, 5, 5, 2)], onto)
    empty = {name: [] if isinstance(value, list) else value for name, value in call.items()}
    assert ops.foreach_adamw_step_(**empty).shape == (0,)
    assert int(call["skipped"]) == 3


def test_parameters_outside_no_grad_are_refused() -> None:
    call = random_call([make_pair(1, 9, 8, 2)])
    call["B"] = [nn.Parameter(t) for t in call["B"]]
    before = copied(call)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        ops.foreach_adamw_step_(**call)
    assert_same(call, before)
    versions = {name: [t._version for t in call[name]] for name in WRITTEN}
    with torch.no_grad():
        ops.foreach_adamw_step_(**call)
    for name, old in versions.items():  # autograd sees what is modified
        assert all(t._version > version for t, version in zip(call[name], old, strict=True)), name
    assert call["skipped"]._version > 0 and call["E"][0]._version == 0


# Wrong calls: an error that names the argument, and nothing is modified.


def two_pairs() -> list[Pair]:
    return [make_pair(0, 9, 11, 3), make_pair(1, 5, 6, 2)]


def one_changed(name: str, index: int, value: Callable, onto: str = "B") -> dict[str, Any]:
    """The call with one entry of a list made another, which a function of it gives."""
    call = random_call(two_pairs(), onto)
    call[name][index] = value(call[name][index])
    return call


@pytest.mark.parametrize(
    "name, index, value, says",
    [
        ("A", 1, lambda t: t.T.contiguous().T, r"A\[1\] must be contiguous"),
        ("B", 0, lambda t: t.T.contiguous().T, r"B\[0\] must be contiguous"),
        ("grad_B", 1, lambda t: t[:-1], r"grad_B\[1\] must have the shape of B\[1\]"),
        ("E", 1, lambda t: t[:-1], r"E\[1\] must have the shape of B\[1\].*4, 2"),
        ("E", 0, lambda t: t.double(), r"E\[0\] must be float32"),
        ("ema", 1, lambda t: t.double(), r"ema\[1\] must be float32"),
        ("exp_avg", 0, lambda t: t.T, r"exp_avg\[0\] must have the shape of A\[0\]"),
        ("exp_avg", 3, lambda t: t.half(), r"exp_avg\[3\] must have the dtype of B\[1\]"),
        ("exp_avg_sq", 2, lambda t: t[:1], r"exp_avg_sq\[2\] must have the shape of B\[0\]"),
        ("exp_avg_sq", 1, lambda t: t.T.contiguous().T, r"exp_avg_sq\[1\] must be contiguous"),
        (
            "step",
            2,
            lambda t: t.double(),
            r"step\[2\] must be a float32 .*got float64 of shape \(\)",
        ),
        ("step", 1, lambda t: t.long(), r"step\[1\] must be a float32 .*got int64 of shape \(\)"),
        (
            "step",
            3,
            lambda t: t.reshape(1),
            r"step\[3\] must be a float32 .*float32 of shape \(1\)",
        ),
        ("step", 0, lambda t: t - 20000, r"step\[0\] must be at least 0, got -"),
        ("step", 1, lambda t: t * math.nan, r"step\[1\] must be at least 0"),
        ("lr", 3, lambda x: -0.1, r"lr\[3\] must be finite and at least 0, got -0.1"),
        ("lr", 0, lambda x: math.inf, r"lr\[0\] must be finite"),
        ("beta1", 1, lambda x: 1.0, r"beta1\[1\] must be finite and in \[0, 1\), got 1"),
        ("beta2", 2, lambda x: -0.5, r"beta2\[2\] must be finite and in \[0, 1\), got -0.5"),
        ("beta2", 2, lambda x: math.nan, r"beta2\[2\] must be finite"),
        ("eps", 0, lambda x: -1e-8, r"eps\[0\] must be finite and at least 0"),
        ("weight_decay", 3, lambda x: math.nan, r"weight_decay\[3\] must be finite, got"),
        ("scaling", 1, lambda x: 0.0, r"scaling\[1\] must be finite and not 0"),
    ],
    ids=lambda value: "" if callable(value) else str(value),  # equal in every process
)
@pytest.mark.parametrize("onto", ["B", "both"])
def test_errors_name_the_entry(
    onto: str, name: str, index: int, value: Callable, says: str
) -> None:
    if onto == "both" and name in ("E", "ema"):
        says = says.replace(f"[{index}\\]", f"[{index + 2}\\]", 1)
        assert f"[{index + 2}" in says
        index += 2  # after those of all A
    call = one_changed(name, index, value, onto)
    before = copied(call)
    with pytest.raises(RuntimeError, match=says):
        ops.foreach_adamw_step_(**call)
    assert_same(call, before)
    assert int(call["skipped"]) == int(before["skipped"])


@pytest.mark.parametrize(
    "name", ["E", "ema", "exp_avg", "exp_avg_sq", "step", "lr", "beta1", "beta2", "eps"]
)
@pytest.mark.parametrize("pairs", [0, 2])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_lists_of_other_lengths(onto: str, name: str, pairs: int) -> None:
    call = random_call(two_pairs(), onto)
    value = call[name][:1]
    if pairs == 0:
        call = {key: [] if isinstance(x, list) else x for key, x in call.items()}
    call[name] = value
    with pytest.raises(RuntimeError, match=rf"{name} must have .* per pair.*, got 1"):
        ops.foreach_adamw_step_(**call)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"beta": 1.1}, "beta must be in .*1.1"),
        ({"rho": -1.0}, "rho must be"),
        ({"onto": "A"}, r"ema\[0\] must have the shape of A\[0\]"),
        ({"onto": "both"}, "ema must have two entries per pair, all A and all B, 4, got 2"),
        ({"onto": "C"}, "onto must be"),
        ({"norm_scope": "x"}, "norm_scope must be"),
        ({"rtol": 0.0}, "rtol must be"),
        ({"skipped": torch.tensor(7.0)}, "skipped must be an int64 .*got float32 of shape"),
    ],
    ids=str,
)
def test_options(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        ops.foreach_adamw_step_(**{**random_call(two_pairs()), **changed})


@pytest.mark.parametrize("name", ["grad_A", "E", "skipped", *WRITTEN])
@pytest.mark.parametrize("to", ["meta", "cpu"])
@pytest.mark.parametrize("onto", ["B", "both"])
def test_devices_are_not_mixed(onto: str, to: str, name: str) -> None:
    """One tensor on meta sends the whole call to the kernel that computes nothing."""
    call = random_call(two_pairs(), onto)
    if to == "cpu":
        call = on_meta(call)
    before = copied(call)
    if name == "skipped":
        call[name] = torch.zeros_like(call[name], device=to)
    else:
        call[name][1] = torch.zeros_like(call[name][1], device=to)
    if (to, name) == ("cpu", "step"):  # AdamW keeps it there
        assert ops.foreach_adamw_step_(**call).device.type == "meta"
        return
    says = (
        rf"{'B' if name == 'A' else name}.* must be on the "  # B[1] beside A[1] is looked at first
    )
    with pytest.raises(ValueError, match=says):
        ops.foreach_adamw_step_(**call)
    if name in ("grad_A", "A", "B", "E", "ema", "skipped"):
        with pytest.raises(ValueError, match=says):
            ops.foreach_perturb_ema_(**{n: call[n] for n in FOR_AVERAGES}, onto=onto)
    if to == "meta":
        for written in WRITTEN:
            for x, y in zip(call[written], before[written], strict=True):
                assert x.device.type == "meta" or same_bits(x, y)


@pytest.mark.parametrize("onto", ["B", "both"])
def test_shapes_are_checked_while_traced(onto: str) -> None:
    for name in ("E", "ema", "exp_avg", "exp_avg_sq", "step"):
        call = on_meta(one_changed(name, 1, lambda t: torch.ones(4, 4), onto))
        says = "float32 tensor without dimensions" if name == "step" else "have the shape of"
        error = TypeError if name == "step" else ValueError
        with pytest.raises(error, match=rf"{name}\[1\] must .*{says}"):
            ops.foreach_adamw_step_(**call)
    for name in ("lr", "weight_decay"):
        call = on_meta({**random_call(two_pairs()[:1]), name: [0.1]})
        with pytest.raises(ValueError, match=f"{name} must have two entries per pair.*2, got 1"):
            ops.foreach_adamw_step_(**call)
