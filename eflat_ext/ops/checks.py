"""The operators' arguments, checked in Python: the exceptions that the dispatcher cannot raise.

``csrc/arguments.h`` checks the same before a kernel runs, and can raise RuntimeError only. Messages
name the argument, what was given and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256
MIN_RTOL = 1e-7


def check_options(rho: float, onto: str, norm_scope: str, rtol: float | None) -> None:
    """TypeError or ValueError unless these are what every operator takes."""
    for name, value in (("rho", rho), ("rtol", rtol)):
        if not (isinstance(value, (int, float)) or (name == "rtol" and value is None)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (_is_finite(rho) and rho >= 0):
        raise ValueError(f"rho must be finite and at least 0, got {rho}")
    if onto not in ("A", "B", "both"):
        raise ValueError(f"onto must be 'B', 'A' or 'both', got {onto!r}")
    if norm_scope not in ("layer", "global"):
        raise ValueError(f"norm_scope must be 'layer' or 'global', got {norm_scope!r}")
    if rtol is not None and not MIN_RTOL <= rtol < 1:
        raise ValueError(f"rtol must be None or in [{MIN_RTOL}, 1), got {rtol}")


def check_one_factor(onto: str) -> None:
    """ValueError for "both", where there are two perturbations."""
    if onto == "both":
        raise ValueError(
            "onto must be 'B' or 'A', got 'both', which has two E: see foreach_perturb"
        )


def perturbed(onto: str, A: Sequence[T], B: Sequence[T]) -> list[T]:
    """Of what goes with all A and with all B, that for the factors that are perturbed."""
    return [*(A if onto != "B" else ()), *(B if onto != "A" else ())]


def check_pairs(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    scaling: Sequence[float],
) -> None:
    """TypeError or ValueError unless the lists are pairs of one device."""
    lists = {"A": A, "B": B, "grad_A": grad_A, "grad_B": grad_B, "scaling": scaling}
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {type(values).__name__}")
        if len(values) != len(A):
            raise ValueError(f"{name} must have one entry per pair, {len(A)}, got {len(values)}")
    for i, pair in enumerate(zip(A, B, grad_A, grad_B, scaling, strict=True)):
        check_pair(*pair, f"[{i}]")
        if pair[0].device != A[0].device:
            raise ValueError(
                f"A[{i}] must be on the device of A[0], {A[0].device}, got {pair[0].device}"
            )


def check_pair(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float, index: str
) -> None:
    """As :func:`check_pairs` for one pair; ``index`` is "[3]" in a list, else ""."""
    named = {f"A{index}": A, f"B{index}": B, f"grad_A{index}": grad_A, f"grad_B{index}": grad_B}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor, got {kind}")
        if tensor.dtype not in _FACTOR_DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}"
            )
        if tensor.dtype != A.dtype:
            raise TypeError(
                f"{name} must have the dtype of A{index}, {A.dtype}, got {tensor.dtype}"
            )
        if tensor.device != A.device:
            raise ValueError(
                f"{name} must be on the device of A{index}, {A.device}, got {tensor.device}"
            )
    if A.dim() != 2:
        raise ValueError(f"A{index} must be 2-d, (r, m), got shape {tuple(A.shape)}")
    if B.dim() != 2:
        raise ValueError(f"B{index} must be 2-d, (n, r), got shape {tuple(B.shape)}")
    if B.shape[1] != A.shape[0]:
        raise ValueError(
            f"B{index} must be (n, r) for A{index} of shape (r, m) = {tuple(A.shape)}, "
            f"got shape {tuple(B.shape)}"
        )
    for grad, factor, name in ((grad_A, A, "A"), (grad_B, B, "B")):
        if grad.shape != factor.shape:
            raise ValueError(
                f"grad_{name}{index} must have the shape of {name}{index}, {tuple(factor.shape)}, "
                f"got {tuple(grad.shape)}"
            )
    if not 1 <= A.shape[0] <= MAX_RANK:
        raise ValueError(f"the rank of A{index} must be 1 to {MAX_RANK}, got {A.shape[0]}")
    if A.numel() == 0 or B.numel() == 0:
        raise ValueError(
            f"A{index} and B{index} must not be empty, got shapes {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling{index} must be a number, got {type(scaling).__name__}")
    if not _is_finite(scaling) or scaling == 0:
        raise ValueError(f"scaling{index} must be finite and not 0, got {scaling}")


def check_memory(named: dict[str, Tensor | Sequence[Tensor]]) -> None:
    """ValueError if the storage of a tensor no longer holds it: somebody has freed it, say."""
    for name, value in named.items():
        for i, t in enumerate([value] if isinstance(value, Tensor) else value):
            steps = zip(t.stride(), t.shape, strict=True)
            last = t.storage_offset() + sum(stride * (size - 1) for stride, size in steps)
            there = t.untyped_storage().nbytes()
            if t.numel() > 0 and (last + 1) * t.element_size() > there:
                index = "" if isinstance(value, Tensor) else f"[{i}]"
                raise ValueError(
                    f"{name}{index} must lie within its storage, got a storage of {there} bytes"
                )


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int beyond all floats
        return False


def check_averages(
    E: Sequence[Tensor],
    ema: Sequence[Tensor],
    skipped: Tensor,
    targets: Sequence[Tensor],
    beta: float,
) -> None:
    """ValueError unless what was added, averages, counter and their weight suit the targets."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    check_alike("ema", ema, targets)
    if E:  # an empty list: nothing was added
        check_alike("E", E, targets)
    if targets and skipped.device != targets[0].device:
        raise ValueError(
            f"skipped must be on the device of A[0], {targets[0].device}, got {skipped.device}"
        )


def check_alike(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """ValueError unless the tensors have the shapes and the device of the others."""
    check_shapes(name, tensors, [t.shape for t in like])
    for one in like[:1]:
        check_devices(name, tensors, one.device)


def check_devices(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    """ValueError unless all are on the device."""
    # A call with one tensor on meta among others comes here too, and would seem to succeed.
    for i, t in enumerate(tensors):
        if t.device != device:
            raise ValueError(f"{name}[{i}] must be on the device {device}, got {t.device}")


def check_shapes(name: str, tensors: Sequence[Tensor], expected: Sequence[torch.Size]) -> None:
    """ValueError unless the shapes are the expected ones."""
    if [t.shape for t in tensors] != list(expected):
        raise ValueError(
            f"{name} must have the shapes {[tuple(shape) for shape in expected]}, "
            f"got {[tuple(t.shape) for t in tensors]}"
        )
