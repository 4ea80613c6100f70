"""Check the operators' arguments in Python, for errors of the types that users expect.

``csrc/bindings/arguments.h`` checks the same in front of every kernel, but can raise RuntimeError
alone. The checks of options are also those of perturbations and optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from eflat_ext.reference import perturbed_factors

_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIN_RTOL = 1e-7
_TWO_ENTRIES = "two entries per pair, all A and all B"


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
        _check_dtype(name, tensor)
        if tensor.dtype != A.dtype:
            raise TypeError(
                f"{name} must have the dtype of A{index}, {A.dtype}, got {tensor.dtype}"
            )
        if tensor.device != A.device:
            raise ValueError(
                f"{name} must be on the device of A{index}, {A.device}, got {tensor.device}"
            )
    _check_factors(f"A{index}", A, f"B{index}", B)
    for grad, factor, name in ((grad_A, A, "A"), (grad_B, B, "B")):
        if grad.shape != factor.shape:
            raise ValueError(
                f"grad_{name}{index} must have the shape of {name}{index}, {tuple(factor.shape)}, "
                f"got {tuple(grad.shape)}"
            )
    _check_scaling(f"scaling{index}", scaling)


def check_bound(ema: Sequence[Tensor], B: Sequence[Tensor], scaling: Sequence[float]) -> None:
    """Raise TypeError or ValueError unless averages onto A and the factors B make pairs."""
    check_length("B", B, len(ema))
    check_length("scaling", scaling, len(ema))
    pairs = zip(named_entries("ema", ema), named_entries("B", B), scaling, strict=True)
    for i, ((name, average), (name_B, b), s) in enumerate(pairs):
        for named, t in ((name, average), (name_B, b)):
            check_device(named, t, "ema[0]", ema[0])
            _check_dtype(named, t)
        _check_factors(name, average, name_B, b)
        _check_scaling(f"scaling[{i}]", s)


def _check_factors(name_A: str, A: Tensor, name_B: str, B: Tensor) -> None:
    """Raise ValueError unless A (r, m) and B (n, r) can be multiplied."""
    if A.dim() != 2:
        raise ValueError(f"{name_A} must be 2-d, (r, m), got shape {tuple(A.shape)}")
    if B.dim() != 2:
        raise ValueError(f"{name_B} must be 2-d, (n, r), got shape {tuple(B.shape)}")
    if B.shape[1] != A.shape[0]:
        raise ValueError(
            f"{name_B} must be (n, r) for {name_A} of shape (r, m) = {tuple(A.shape)}, "
            f"got shape {tuple(B.shape)}"
        )
    if A.shape[0] == 0:
        raise ValueError(f"the rank of {name_A} must be at least 1, got 0")
    if A.numel() == 0 or B.numel() == 0:
        raise ValueError(
            f"{name_A} and {name_B} must not be empty, got shapes {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )


def _check_scaling(name: str, scaling: float) -> None:
    number = as_number(name, scaling)
    if number == 0 or not math.isfinite(number):
        raise ValueError(f"{name} must be finite and not 0, got {scaling}")


def _check_dtype(name: str, t: Tensor) -> None:
    if t.dtype not in _FACTOR_DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def check_memory(named: dict[str, Tensor | Sequence[Tensor]]) -> None:
    """Raise ValueError if a tensor's storage no longer holds it: somebody has freed it, say."""
    for name, t in named_tensors(named.items()):
        steps = zip(t.stride(), t.shape, strict=True)
        last = t.storage_offset() + sum(stride * (size - 1) for stride, size in steps)
        there = t.untyped_storage().nbytes()
        if t.numel() > 0 and (last + 1) * t.element_size() > there:
            raise ValueError(f"{name} must lie within its storage, got a storage of {there} bytes")


Named: TypeAlias = list[tuple[str, Tensor]]  # tensors by their names in messages


def check_averages(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    E: Sequence[Tensor],
    ema: Sequence[Tensor],
    skipped: Tensor,
    beta: float,
    onto: str,
) -> None:
    """Raise TypeError or ValueError unless the moving averages, what was added, and the counter
    suit the perturbed factors."""
    check_beta(beta)
    targets = perturbed_factors(onto, named_entries("A", A), named_entries("B", B))
    check_entries("ema", ema, targets, of_averages=True, written=True)
    if E:  # an empty list: nothing was added
        check_entries("E", E, targets, of_averages=True)
    check_scalar("skipped", skipped, torch.int64)
    for name, factor in targets[:1]:
        check_device("skipped", skipped, name, factor)


def check_moments(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    numbers: dict[str, Sequence[float]],
) -> None:
    """Raise TypeError or ValueError unless AdamW's state and numbers suit the factors."""
    factors = named_entries("A", A) + named_entries("B", B)
    for name, t in factors:
        _check_contiguous(name, t)
    check_entries("exp_avg", exp_avg, factors, written=True)
    check_entries("exp_avg_sq", exp_avg_sq, factors, written=True)
    check_length("step", step, len(factors), _TWO_ENTRIES)
    for i, (t, (name, factor)) in enumerate(zip(step, factors, strict=True)):
        check_scalar(f"step[{i}]", t, torch.float32)
        if t.device.type != "cpu" and t.device != factor.device:
            raise ValueError(
                f"step[{i}] must be on the CPU or {factor.device}, the device of {name}, "
                f"got {t.device}"
            )
    for name, values in numbers.items():
        check_length(name, values, len(factors), _TWO_ENTRIES)
        for i, value in enumerate(values):
            below_one, signed = name in ("beta1", "beta2"), name == "weight_decay"
            within = (signed or value >= 0) and (value < 1 or not below_one)
            if not (math.isfinite(value) and within):
                range_ = " and in [0, 1)" if below_one else "" if signed else " and at least 0"
                raise ValueError(f"{name}[{i}] must be finite{range_}, got {value}")


def named_entries(name: str, tensors: Sequence[Tensor]) -> Named:
    """Return the entries of a list with their names in messages, such as "A[0]"."""
    return [(f"{name}[{i}]", t) for i, t in enumerate(tensors)]


def check_entries(
    name: str,
    tensors: Sequence[Tensor],
    like: Named,
    *,
    of_averages: bool = False,
    written: bool = False,
) -> None:
    """Raise TypeError or ValueError unless each tensor suits the factor in its place.

    Args:
        of_averages: they are float32 for factors of up to 32 bits; else of the factor's type.
        written: they are updated in place.
    """
    both = {factor[0] for factor, _ in like} == {"A", "B"}
    check_length(name, tensors, len(like), _TWO_ENTRIES if both else "one entry per pair")
    for i, (t, (like_name, factor)) in enumerate(zip(tensors, like, strict=True)):
        entry = f"{name}[{i}]"
        if t.shape != factor.shape:
            raise ValueError(
                f"{entry} must have the shape of {like_name}, {tuple(factor.shape)}, "
                f"got {tuple(t.shape)}"
            )
        check_device(entry, t, like_name, factor)
        wide = torch.float64 if factor.dtype == torch.float64 else torch.float32
        if of_averages and t.dtype != wide:
            raise TypeError(
                f"{entry} must be {_dtype(wide)} for {_dtype(factor.dtype)} factors, "
                f"got {_dtype(t.dtype)}"
            )
        if not of_averages and t.dtype != factor.dtype:
            raise TypeError(
                f"{entry} must have the dtype of {like_name}, {_dtype(factor.dtype)}, "
                f"got {_dtype(t.dtype)}"
            )
        if written:
            _check_contiguous(entry, t)


def check_scalar(name: str, t: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless a tensor has a type and no dimensions."""
    if t.dtype != dtype or t.dim() > 0:
        article = "an" if dtype == torch.int64 else "a"
        raise TypeError(
            f"{name} must be {article} {_dtype(dtype)} tensor without dimensions, "
            f"got {_dtype(t.dtype)} of shape ({', '.join(map(str, t.shape))})"
        )


def _check_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, since it is updated in place")


def check_device(name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless two tensors are on one device."""
    # A call with one tensor on meta among others comes here too, and would seem to succeed.
    if t.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {t.device}"
        )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
