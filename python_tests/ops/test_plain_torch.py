"""The operators in plain torch: where there are no kernels, and beyond the kernels' ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_cuda
import own_process
import pytest
import second_device
import torch
from adamw_case import copied, mapped, random_call
from strategies import HOST_CUDA, ONTO, RHO, error, lists, make_pair, same_bits
from torch import Tensor

from eflat_ext import reference
from eflat_ext.ops import no_kernel

ops = torch.ops.eflat
pytestmark = pytest.mark.skipif(HOST_CUDA, reason="about what runs without the kernels")
HERE = "EFLAT_TEST_SECOND_DEVICE" in os.environ
with_second_device = pytest.mark.skipif(not HERE, reason="run by test_on_a_second_device")


@pytest.mark.skipif(HERE, reason="starts this process")
def test_on_a_second_device() -> None:
    own_process.run(Path(__file__), "-k", "device or once", EFLAT_TEST_SECOND_DEVICE="1")


@pytest.mark.parametrize(
    "tests, chosen",
    [
        ("operators", "float or global or average or frozen or mixed"),
        ("operators_bad_cases", ""),
        ("onto_both", "entries or numbers or columns or radius"),
        ("fused_step", "errors or options or other_lengths or bad_pairs"),
    ],
)
def test_keeps_the_bounds_and_the_errors_of_the_kernels(tests: str, chosen: str) -> None:
    own_process.run(
        Path(__file__).with_name(f"test_{tests}.py"),
        *("-k", chosen),
        EFLAT_TEST_KERNELS="eflat_plain_torch",
        HYPOTHESIS_PROFILE="few",
    )


def on_device(call: dict[str, Any]) -> dict[str, Any]:
    device = second_device.NAME
    step = {"step": call["step"]} if "step" in call else {}  # as AdamW keeps it
    return {**mapped(call, lambda t: t.to(device)), **step}


def on_cpu(call: dict[str, Any]) -> dict[str, Any]:
    return mapped(call, Tensor.cpu)


def three_pairs() -> list:
    seed = int(torch.randint(2**31, ()))
    shapes = [(40, 30, 4), (25, 60, 3), (40, 30, 4)]  # two of one shape
    return [make_pair(seed + i, *shape) for i, shape in enumerate(shapes)]


def calls(onto: str) -> dict[str, dict[str, Any]]:
    """Return arguments for every operator, by name."""
    step = random_call(three_pairs(), onto)
    names = ("A", "B", "grad_A", "grad_B", "E", "ema", "skipped", "scaling", "rho", "beta", "onto")
    A, B, grad_A, grad_B, scaling = lists(three_pairs())
    found = {
        "foreach_perturb": dict(
            A=A, B=B, grad_A=grad_A, grad_B=grad_B, scaling=scaling, rho=RHO, onto=onto
        ),
        "foreach_perturb_ema_": copied({name: step[name] for name in names}),
        "foreach_adamw_step_": step,
        "foreach_bound": dict(ema=A, B=B, scaling=scaling, rho=1.0, norm_scope="global"),
    }
    if onto != "both":
        one = dict(A=A[0], B=B[0], grad_A=grad_A[0], grad_B=grad_B[0], scaling=2.0, rho=RHO)
        found["perturb"] = {**one, "onto": onto}
    return found


def all_close(given: Any, expected: Any) -> bool:
    if isinstance(given, dict):
        return all(all_close(given[name], expected[name]) for name in given)
    if isinstance(given, (list, tuple)):
        return all(map(all_close, given, expected))
    return not isinstance(given, Tensor) or error(given, expected) < 1e-6


@with_second_device
@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("onto", ONTO)
@pytest.mark.filterwarnings("ignore:eflat_ext has no kernels")
def test_another_device_gives_the_numbers_of_the_cpu(onto, float64, monkeypatch) -> None:
    monkeypatch.setattr(no_kernel, "has_float64", lambda device_type: float64)
    for name, call in calls(onto).items():
        there = on_device(copied(call))
        expected = getattr(ops, name)(**call)
        result = getattr(ops, name)(**there)
        tensors = torch.utils._pytree.tree_leaves(result)
        assert all(t.device.type == second_device.NAME for t in tensors)
        assert all_close(on_cpu({"": result}), {"": expected}), name
        assert all_close(on_cpu(there), call), name  # what was updated in place


@with_second_device
def test_a_warning_tells_once_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(no_kernel, "_warned", set())
    call = on_device(calls("B")["perturb"])
    with pytest.warns(UserWarning, match="no kernels for second .* in plain torch"):
        ops.perturb(**call)
    ops.perturb(**call)


@with_second_device
@pytest.mark.parametrize("steps", ["on the CPU", "on the device"])
@pytest.mark.parametrize("onto", ONTO)
def test_nothing_waits_for_the_device(onto: str, steps: str) -> None:
    for name, call in calls(onto).items():
        call = on_device(call)
        if "step" in call and steps == "on the device":
            call["step"] = [t.to(second_device.NAME) for t in call["step"]]
        second_device.reads.clear()
        getattr(ops, name)(**call)
        assert second_device.reads == [], name


@pytest.mark.parametrize("rho", [1e-30, 0.05])
def test_a_layer_beyond_its_type_leaves_a_small_one_alone(rho: float) -> None:
    ones = [torch.ones(1, 2, dtype=torch.float64)] * 2, [torch.ones(3, 1, dtype=torch.float64)] * 2
    gradients = [[t[0], t[0] * 1e100] for t in ones]
    call = (*ones, *gradients, [1.0, 1e-120], rho, "B", "global")
    (E, other), norms = torch.ops.eflat_plain_torch.foreach_perturb(*call)
    (expected, _), expected_norms = ops.foreach_perturb(*call)
    torch.testing.assert_close(E, expected)
    assert E.any() and not other.any() and norms[1].isinf()
    torch.testing.assert_close(norms, expected_norms)


@pytest.mark.parametrize("name", ["perturb", "foreach_perturb", "foreach_bound"])
def test_tensors_that_nothing_can_compute_are_refused(name: str) -> None:
    call = mapped(calls("B")[name], Tensor.to_sparse)
    with pytest.raises(RuntimeError, match="must be a dense tensor, got a sparse_coo one on cpu"):
        getattr(ops, name)(**call)


# Ranks. The CPU's kernels take any; CUDA's hand over to plain torch.


def check_rank(perturb: Callable[..., Any], dtype: torch.dtype, r: int) -> None:
    pair = make_pair(int(torch.randint(2**31, ())), r + 40, 50, r, dtype)
    for onto in ("A", "B"):
        E, norm = perturb(*pair, RHO, onto)
        expected, expected_norm = reference.perturb(*pair, RHO, onto)
        bound = 1e-10 if dtype == torch.float64 else 1e-6
        assert error(E, expected) < bound and error(norm, expected_norm) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_above_256(dtype: torch.dtype) -> None:
    check_rank(ops.perturb, dtype, 300)


def test_cuda_kernels_hand_over_ranks_above_theirs() -> None:
    host_cuda.build()
    check_rank(torch.ops.eflat_float64.perturb, torch.float32, 257)
    step = random_call([make_pair(3, 30, 20, 257), make_pair(4, 30, 20, 3)], "B")
    other = copied(step)
    norms = torch.ops.eflat_float64.foreach_adamw_step_(**step)
    expected = torch.ops.eflat_plain_torch.foreach_adamw_step_(**other)
    assert same_bits(norms, expected) and all_close(step, other)
