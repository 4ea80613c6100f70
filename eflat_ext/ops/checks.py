"""Check the operators' arguments in Python, for errors of the types that users expect.

``csrc/bindings/arguments.h`` checks the same in front of every kernel, but can raise RuntimeError
alone. The checks of options are also those of perturbations and optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256
MIN_RTOL = 1e-7


# Options. Numbers are what the dispatcher takes for one: what float() does, strings excepted.


def as_number(name: str, value: Any) -> float:
    """Return a real number as a float, NaN for an integer beyond all floats.

    Raises:
        TypeError: the value is no number.
    """
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return float(value)
    except OverflowError:
        return math.nan
    except (TypeError, ValueError, RuntimeError):  # the last of tensors
        pass
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_rho(rho: Any, name: str = "rho") -> float:
    """Return the radius as a float; raise ValueError unless it is finite and at least 0."""
    radius = as_number(name, rho)
    if not 0 <= radius < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {rho}")
    return radius


def check_onto(onto: str) -> None:
    """Raise ValueError unless the perturbation is to go onto "B", "A" or "both"."""
    if onto not in ("B", "A", "both"):
        raise ValueError(f"onto must be 'B', 'A' or 'both', got {onto!r}")


def check_one_factor(onto: str) -> None:
    """Raise ValueError for "both", where there are two perturbations."""
    if onto == "both":
        raise ValueError(
            "onto must be 'B' or 'A', got 'both', which has two E: see foreach_perturb"
        )


def check_norm_scope(norm_scope: str) -> None:
    """Raise ValueError unless the scope of the norm is "layer" or "global"."""
    if norm_scope not in ("layer", "global"):
        raise ValueError(f"norm_scope must be 'layer' or 'global', got {norm_scope!r}")


def check_rtol(rtol: Any) -> None:
    """Raise ValueError unless the cutoff is None or in [1e-7, 1)."""
    if rtol is not None and not MIN_RTOL <= as_number("rtol", rtol) < 1:
        raise ValueError(f"rtol must be None or in [{MIN_RTOL}, 1), got {rtol}")


def check_beta(beta: Any, *, positive: bool = False) -> None:
    """Raise ValueError unless the weight of the moving average is in [0, 1]; (0, 1] if positive."""
    value = as_number("beta", beta)
    if not 0 <= value <= 1 or (positive and value == 0):
        raise ValueError(f"beta must be in {'(' if positive else '['}0, 1], got {beta}")


def check_options(rho: float, onto: str, norm_scope: str, rtol: float | None) -> None:
    """Raise TypeError or ValueError unless all of these are right, see the checks of each."""
    check_rho(rho)
    check_onto(onto)
    check_norm_scope(norm_scope)
    check_rtol(rtol)


# Tensors and lists.


def named_tensors(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield what arguments hold under the names of error messages: "A", "B[0]", "B[1]"."""
    for name, value in named:
        if isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", entry) for i, entry in enumerate(value))
        else:
            yield name, value


def check_length(
    name: str, values: Sequence[Any], expected: int, entries: str = "one entry per pair"
) -> None:
    """Raise ValueError unless a list has the expected number of entries."""
    if len(values) != expected:
        raise ValueError(f"{name} must have {entries}, {expected}, got {len(values)}")


def check_pairs(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    grad_A: Sequence[Tensor],
    grad_B: Sequence[Tensor],
    scaling: Sequence[float],
) -> None:
    """Raise TypeError or ValueError unless the lists are pairs of factors on one device."""
    lists = {"A": A, "B": B, "grad_A": grad_A, "grad_B": grad_B, "scaling": scaling}
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} must be a list, got {type(values).__name__}")
        check_length(name, values, len(A))
    for i, pair in enumerate(zip(A, B, grad_A, grad_B, scaling, strict=True)):
        check_pair(*pair, f"[{i}]")
        if pair[0].device != A[0].device:
            raise ValueError(
                f"A[{i}] must be on the device of A[0], {A[0].device}, got {pair[0].device}"
            )


def check_pair(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float, index: str
) -> None:
    """Check one pair as :func:`check_pairs` does; ``index`` is "[3]" in a list, else ""."""
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
    number = as_number(f"scaling{index}", scaling)
    if number == 0 or not math.isfinite(number):
        raise ValueError(f"scaling{index} must be finite and not 0, got {scaling}")


def check_memory(named: dict[str, Tensor | Sequence[Tensor]]) -> None:
    """Raise ValueError if a tensor's storage no longer holds it: somebody has freed it, say."""
    for name, t in named_tensors(named.items()):
        steps = zip(t.stride(), t.shape, strict=True)
        last = t.storage_offset() + sum(stride * (size - 1) for stride, size in steps)
        there = t.untyped_storage().nbytes()
        if t.numel() > 0 and (last + 1) * t.element_size() > there:
            raise ValueError(f"{name} must lie within its storage, got a storage of {there} bytes")


def check_averages(
    E: Sequence[Tensor],
    ema: Sequence[Tensor],
    skipped: Tensor,
    targets: Sequence[Tensor],
    beta: float,
) -> None:
    """Raise ValueError unless the moving averages, what was added, and the counter suit the
    perturbed factors."""
    check_beta(beta)
    check_alike("ema", ema, targets)
    if E:  # an empty list: nothing was added
        check_alike("E", E, targets)
    if targets and skipped.device != targets[0].device:
        raise ValueError(
            f"skipped must be on the device of A[0], {targets[0].device}, got {skipped.device}"
        )


def check_alike(name: str, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Raise ValueError unless the tensors have the shapes and the device of the others."""
    check_shapes(name, tensors, [t.shape for t in like])
    for one in like[:1]:
        check_devices(name, tensors, one.device)


def check_devices(name: str, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Raise ValueError unless all are on the device."""
    # A call with one tensor on meta among others comes here too, and would seem to succeed.
    for i, t in enumerate(tensors):
        if t.device != device:
            raise ValueError(f"{name}[{i}] must be on the device {device}, got {t.device}")


def check_shapes(name: str, tensors: Sequence[Tensor], expected: Sequence[torch.Size]) -> None:
    """Raise ValueError unless the shapes are the expected ones."""
    if [t.shape for t in tensors] != list(expected):
        raise ValueError(
            f"{name} must have the shapes {[tuple(shape) for shape in expected]}, "
            f"got {[tuple(t.shape) for t in tensors]}"
        )
