"""Judge calls of operators by the documentation, not by the code."""

from __future__ import annotations

import math
from typing import Any

import torch
from fuzz_calls import SCHEMAS, Call, tensors_of, two_per_pair, usable
from strategies import DTYPES
from torch import Tensor


def is_number(x: Any) -> bool:
    try:
        return isinstance(x, (int, float)) and bool(math.isfinite(x) or True)
    except OverflowError:
        return False


def wrong_arguments(call: Call) -> set[str]:
    """Return the arguments of which an error has to name one; none if the call is right."""
    a, types = call.arguments, call.types
    wrong = {name for name in a if name not in types}
    for argument in SCHEMAS[call.operator].arguments:
        if argument.name not in a and not argument.has_default_value():
            wrong.add(argument.name)
    for name, kind in types.items():
        if name not in a:
            continue
        is_list = isinstance(a[name], (list, tuple))
        if kind.startswith("List[") != is_list:
            wrong.add(name)
        for x in a[name] if is_list else [a[name]]:
            if (
                ("Tensor" in kind and not usable(x))
                or ("float" in kind and not (is_number(x) or (x is None and "Opt" in kind)))
                or (kind == "str" and x not in legal_strings(call.operator, name))
            ):
                wrong.add(name)
    number = {n: a.get(n) for n in ("rho", "beta", "rtol") if is_number(a.get(n))}
    if "rho" in number and not 0 <= number["rho"] < math.inf:
        wrong.add("rho")
    if "beta" in number and not 0 <= number["beta"] <= 1:
        wrong.add("beta")
    if "rtol" in number and not 1e-7 <= number["rtol"] < 1:
        wrong.add("rtol")
    wrong |= wrong_numbers(a)
    lists = {
        name: [a[name]] if isinstance(a[name], Tensor) else a[name]
        for name, kind in types.items()
        if "Tensor" in kind and name in a and isinstance(a[name], (Tensor, list, tuple))
    }
    if len({t.device for t in tensors_of(list(lists.values()))}) > 1:
        wrong |= set(lists)  # one is on the wrong device: it depends on the others which
    if call.operator != "perturb":
        first = "ema" if call.operator == "foreach_bound" else "A"
        if isinstance(a.get(first), (list, tuple)):
            for name, kind in types.items():
                expected = len(a[first]) * (2 if name in two_per_pair(a) else 1)
                value = a.get(name)
                if kind.startswith("List[") and isinstance(value, (list, tuple)):
                    if name == "E" and not value:
                        continue  # nothing was added
                    wrong |= {name, first} if len(value) != expected else set()
    wrong |= wrong_shapes(call, lists)
    if call.written:
        wrong |= wrong_to_write(call, lists)
    return wrong


def legal_strings(operator: str, name: str) -> tuple[str, ...]:
    if name == "norm_scope":
        return ("layer", "global")
    return ("A", "B") if operator == "perturb" else ("A", "B", "both")


def wrong_numbers(a: dict[str, Any]) -> set[str]:
    """Return the wrong ones among the lists of numbers."""
    limits = {
        "scaling": lambda x: math.isfinite(x) and x != 0,
        "lr": lambda x: 0 <= x < math.inf,
        "eps": lambda x: 0 <= x < math.inf,
        "weight_decay": math.isfinite,
        "beta1": lambda x: 0 <= x < 1,
        "beta2": lambda x: 0 <= x < 1,
    }
    wrong = set()
    for name, legal in limits.items():
        values = a.get(name, [])
        for x in values if isinstance(values, (list, tuple)) else [values]:
            if is_number(x) and not legal(x):
                wrong.add(name)
    return wrong


def wrong_shapes(call: Call, lists: dict[str, Any]) -> set[str]:
    """Return arguments whose shapes or types do not belong together; either may be named."""
    wrong: set[str] = set()

    def of(name: str, i: int) -> Tensor | None:
        value = lists.get(name, ())
        return value[i] if i < len(value) and usable(value[i]) else None

    def check(name: str, i: int, like: str, j: int, dtype: Any = None) -> None:
        x, y = of(name, i), of(like, j)
        if x is None or y is None:
            return
        if x.shape != y.shape or x.dtype != (y.dtype if dtype is None else dtype(y.dtype)):
            wrong.update((name, like))

    count = max((len(v) for v in lists.values()), default=0)
    first = "ema" if call.operator == "foreach_bound" else "A"
    for i in range(count):
        A, B = of(first, i), of("B", i)
        for name, t in ((first, A), ("B", B)):
            if t is not None and (t.dim() != 2 or t.dtype not in DTYPES):
                wrong.add(name)
        if A is not None and B is not None and A.dim() == B.dim() == 2:
            if A.shape[0] != B.shape[1] or (first == "A" and A.dtype != B.dtype):
                wrong.update((first, "B"))
            if A.shape[0] == 0:
                wrong.add(first)
            if min(*A.shape, *B.shape) == 0:
                wrong.update((first, "B"))
        if first == "ema":
            continue
        check("grad_A", i, "A", i)
        check("grad_B", i, "B", i)
        pairs = len(lists.get("A", ()))
        for at, target in enumerate(perturbed(call)):
            for name in ("E", "ema"):
                check(name, at * pairs + i, target, i, average_dtype)
        for name in ("exp_avg", "exp_avg_sq"):
            check(name, i, "A", i)
            check(name, pairs + i, "B", i)
    for t in lists.get("step", ()):
        if usable(t) and (t.dtype != torch.float32 or t.dim() or not float(t.detach()) >= 0):
            wrong.add("step")
    for t in lists.get("skipped", ()):
        if usable(t) and (t.dtype != torch.int64 or t.dim()):
            wrong.add("skipped")
    return wrong


def perturbed(call: Call) -> tuple[str, ...]:
    """Return the names of the perturbed factors."""
    onto = call.arguments.get("onto", "B")
    return ("A", "B") if onto == "both" else ("A",) if onto == "A" else ("B",)


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_memory(t: Tensor, other: Any) -> bool:
    return usable(other) and (t.data_ptr(), t.nbytes) == (other.data_ptr(), other.nbytes)


def wrong_to_write(call: Call, lists: dict[str, Any]) -> set[str]:
    """Return written arguments that are not contiguous, share memory, or require a gradient."""
    wrong: set[str] = set()
    ranges = []
    averages = lists.get("ema", ())
    for name, tensors in lists.items():
        for i, t in enumerate(tensors):
            if not usable(t):
                continue
            writes = name in call.written
            if writes and (not t.is_contiguous() or t.is_neg() or t.is_conj()):
                wrong.add(name)
            if writes and call.mode == "grad" and t.requires_grad:
                wrong.add(name)
            if writes and call.mode != "inference" and t.is_inference():
                wrong.add(name)
            if name == "E" and i < len(averages) and same_memory(t, averages[i]):
                continue  # what was added may be the average
            if t.is_contiguous() and not t.is_neg() and not t.is_conj() and t.numel():
                start = t.data_ptr()
                ranges.append((start, start + t.numel() * t.element_size(), writes, name))
    furthest = [(0, ""), (0, "")]  # of all so far, of what is written
    for start, end, writes, name in sorted(ranges):
        reach, other = furthest[0 if writes else 1]
        if reach > start:
            wrong.update((name, other))
        furthest[0] = max(furthest[0], (end, name))
        if writes:
            furthest[1] = max(furthest[1], (end, name))
    return wrong
