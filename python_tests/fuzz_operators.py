"""Random wrong calls of the operators, each made from a valid one by one to three changes.

    python python_tests/fuzz_operators.py SEED [FIRST [COUNT]]    prints the outcomes as JSON

A call follows from its seed and number alone. What it should do is said by :func:`wrong_arguments`,
written from the documentation, not from the code: an empty set means a result like the reference's,
another one an error that names one of its arguments.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import math
import random
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import conftest  # noqa: F401  (threads, and the kernels that EFLAT_TEST_KERNELS names)
import fuzz_arguments as change
import torch
from adamw_case import NUMBERS as ADAMW_NUMBERS
from adamw_case import one_after_another, random_call
from strategies import DTYPES, Pair, ambiguous, make_pair
from torch import Tensor

import eflat_ext
from eflat_ext import reference

SECONDS = 60  # that a call may take
PAIR = ("A", "B", "grad_A", "grad_B")
TWO_PER_PAIR = ("exp_avg", "exp_avg_sq", "step", *ADAMW_NUMBERS)
IN_WORDS = re.compile(r"must|expected|Expected|missing|Unknown|unexpected|takes", re.DOTALL)


def schemas() -> dict[str, Any]:
    """Every operator of torch.ops.eflat."""
    found = (s for s in torch._C._jit_get_all_schemas() if s.name.startswith("eflat::"))
    return {schema.name.removeprefix("eflat::"): schema for schema in found}


SCHEMAS = schemas()
TYPES = {name: {a.name: str(a.type) for a in s.arguments} for name, s in SCHEMAS.items()}
WRITTEN = {
    name: [a.name for a in s.arguments if a.alias_info and a.alias_info.is_write]
    for name, s in SCHEMAS.items()
}
PUBLIC = ("perturb", "foreach_perturb")


@dataclass
class Call:
    operator: str
    public: bool
    arguments: dict[str, Any]
    mode: str = "grad"
    changes: list[str] = field(default_factory=list)
    unsure: bool = False

    @property
    def types(self) -> dict[str, str]:
        return TYPES[self.operator]

    @property
    def written(self) -> list[str]:
        return WRITTEN[self.operator]

    def __str__(self) -> str:
        arguments = ", ".join(f"{k}={short(v)}" for k, v in self.arguments.items())
        name = f"eflat_ext.{self.operator}" if self.public else f"torch.ops.eflat.{self.operator}"
        return f"{name}({arguments}) in mode {self.mode}, changed: {'; '.join(self.changes)}"

    def run(self) -> Any:
        function = getattr(eflat_ext if self.public else torch.ops.eflat, self.operator)
        modes = {
            "grad": contextlib.nullcontext,
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
        }
        with modes[self.mode]():
            return function(**self.arguments)


def short(value: Any) -> str:
    if isinstance(value, Tensor):
        try:
            shape: Any = tuple(value.shape)
        except RuntimeError:
            shape = "nested"
        text = f"<{str(value.dtype)[6:]} {shape}"
        if value.layout == torch.strided and not value.is_nested:
            text += f" strides {value.stride()} at {value.storage_offset()}"
        return f"{text} {value.layout} {value.device}{' grad' * value.requires_grad}>"
    if isinstance(value, (list, tuple)):
        more = f", ... {len(value)} in all" if len(value) > 6 else ""
        return f"[{', '.join(map(short, value[:6]))}{more}]"
    return repr(value[:60] if isinstance(value, (str, bytes)) else value)[:60]


# --- making calls ------------------------------------------------------------------------


def valid_call(rng: random.Random) -> Call:
    operator = rng.choice(sorted(SCHEMAS))
    public = operator in PUBLIC and rng.random() < 0.5
    count = rng.choice([0, 1, 1, 2, 2, 3, 5])
    dtype, onto = rng.choice(DTYPES), rng.choice("AB")

    def size() -> int:
        return rng.choice([rng.randint(1, 12), rng.randint(1, 12), 33, 65, 300])

    pairs = [
        make_pair(
            *(rng.getrandbits(32), size(), size(), rng.choice([1, 2, 3, 4, 8, 17])),
            *(dtype, 10.0 ** rng.random(), 10.0 ** rng.random()),
            *(rng.choice([1.0, 2.0, -0.5]), rng.random() < 0.5),
        )
        for _ in range(max(count, 1))
    ]
    if operator == "foreach_bound":
        onto = "A"  # the moving averages that it is for
    values = random_call(pairs, onto, rng.choice(["layer", "global"]), rng.getrandbits(32))
    values["rho"] = rng.choice([0.05, 0.0, 1.0, 3])
    values["beta"] = rng.choice([0.9, 0.0, 1.0, 0.3])
    values["rtol"] = rng.choice([None, None, 1e-7, 1e-3, 0.3])
    arguments = {}
    for argument in SCHEMAS[operator].arguments:
        value = values[argument.name]  # KeyError: an argument that this file does not know yet
        if isinstance(value, list):
            single = str(argument.type) in ("Tensor", "float")
            value = value[0] if single else value if count else []
        if not (argument.has_default_value() and rng.random() < 0.2 and argument.name != "onto"):
            arguments[argument.name] = value
    mode = rng.choices(["grad", "no_grad", "inference"], [6, 2, 1])[0]
    return Call(operator, public, arguments, mode)


def changed_tensor(rng: random.Random, call: Call, name: str, t: Any) -> Any:
    if not isinstance(t, Tensor) or rng.random() < 0.1:
        call.changes.append(f"{name}: no tensor")
        return change.no_tensor(rng)
    if is_freed(t):
        return t  # torch itself would read what is not there
    if rng.random() < 0.1:
        return shared(rng, call, name, t)
    function = rng.choice(change.CHANGES)
    if function is change.read_only and name.partition("[")[0] in call.written:
        function = change.flagged_read_only  # the other would end torch's own operators, too
    if function is change.bad_storage and (no_pairs(call) or virtual(call)):
        return t  # of no pairs nothing is read; torch cannot make a fake one of it
    if function is change.fake and has_freed(call):
        return t
    try:
        new = function(rng, t)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return t  # that cannot be had of such a tensor
    call.changes.append(f"{name}: {function.__name__}")
    # Of no pairs the counter is the only tensor: on meta the call is one that is traced.
    call.unsure |= function in change.UNSURE or (function is change.other_device and no_pairs(call))
    return new


def shared(rng: random.Random, call: Call, name: str, t: Tensor) -> Tensor:
    """Another argument, or a view of its memory with the shape of this one."""
    others = [
        x
        for value in call.arguments.values()
        for x in (value if isinstance(value, list) else [value])
        if isinstance(x, Tensor) and x is not t and usable(x)
    ]
    if not others:
        return t
    call.changes.append(f"{name}: shared memory")
    other = rng.choice(others)
    if rng.random() < 0.5 or other.dtype != t.dtype or other.numel() < t.numel():
        return other
    at = rng.randint(0, other.numel() - t.numel())
    return other.detach().reshape(-1)[at : at + t.numel()].view(t.shape)


def changed_number(rng: random.Random, call: Call, name: str) -> Any:
    value, unsure = change.number(rng)
    call.changes.append(f"{name}: {str(value)[:20]!r}")
    call.unsure |= unsure
    return value


def changed_list(rng: random.Random, call: Call, name: str, values: Any, numbers: bool) -> Any:
    if not isinstance(values, list) or rng.random() < 0.08:
        if has_freed(call):
            return values  # torch would read what is in lists of lists
        call.changes.append(f"{name}: no list")
        given = list(values) if isinstance(values, (list, tuple)) else [values]
        call.unsure = True  # torch takes some sequences
        return change.no_list(rng, given)
    values = list(values)
    if not values or rng.random() < 0.15:
        kind = rng.randrange(4)
        call.changes.append(f"{name}: entries {('less', 'more', 'none', 'many')[kind]}")
        if kind == 0:
            return values[:-1]
        if kind == 1:
            extra = 1.0 if numbers else torch.ones(3, 4)
            return [*values, values[-1] if values else extra]
        return [] if kind == 2 else values * (rng.choice([2, 50, 300]) if len(values) < 11 else 2)
    at = rng.randrange(len(values))
    one = f"{name}[{at}]"
    if numbers:
        values[at] = changed_number(rng, call, one)
    else:
        values[at] = changed_tensor(rng, call, one, values[at])
    return tuple(values) if rng.random() < 0.1 else values


def no_pairs(call: Call) -> bool:
    pairs = call.arguments.get("A")
    return isinstance(pairs, (list, tuple)) and not pairs


def is_freed(t: Any) -> bool:
    strided = isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested
    return strided and not in_storage(t)


def has_freed(call: Call) -> bool:
    return any(map(is_freed, tensors_of(list(call.arguments.values()))))


def every_tensor(call: Call, function: Any) -> None:
    if has_freed(call):
        return
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            call.arguments[name] = function(value)
        elif isinstance(value, (list, tuple)):
            call.arguments[name] = [function(x) if isinstance(x, Tensor) else x for x in value]


def change_all(rng: random.Random, call: Call) -> None:
    """One change of the whole call: all tensors elsewhere, arguments missing, surplus, swapped."""
    kind = rng.randrange(8)
    names = sorted(call.arguments)
    call.changes.append(f"whole call, kind {kind}")
    if kind == 0:
        every_tensor(call, lambda t: t.to("meta"))
        call.unsure = True  # the fake kernels may leave some checks to the real ones
    elif kind == 1:
        mode = change.FakeTensorMode()
        every_tensor(call, mode.from_tensor)
        call.unsure = True
    elif kind == 2:
        dtype = rng.choice(change.DTYPES)
        every_tensor(call, lambda t: t.to(dtype) if t.is_floating_point() and t.dim() else t)
    elif kind == 3:
        del call.arguments[rng.choice(names)]
    elif kind == 4:
        call.arguments[rng.choice(["foo", "a", "self"])] = 1.0
    elif kind == 5:
        one, other = rng.sample(names, 2)
        values = call.arguments
        values[one], values[other] = values[other], values[one]
    elif kind == 6:
        every_tensor(call, lambda t: t.clone().requires_grad_(t.is_floating_point()))
    elif not has_freed(call):  # many pairs
        copies = rng.choice([10, 10, 50])
        for name, value in call.arguments.items():
            if isinstance(value, list):
                parts = len(value) if name not in TWO_PER_PAIR else len(value) // 2
                if name in TWO_PER_PAIR:  # all A, then all B
                    value = value[:parts] * copies + value[parts:] * copies
                else:
                    value = value * copies
                clone = name in call.written
                value = [x.clone() if clone and isinstance(x, Tensor) else x for x in value]
                call.arguments[name] = value


def make_call(seed: int, number: int) -> Call:
    rng = random.Random(f"{seed} {number}")
    call = valid_call(rng)
    if number % 20 == 0:
        return call  # some are to be right
    for _ in range(rng.choice([1, 1, 2, 3])):
        names = sorted(call.arguments)
        if not names or rng.random() < 0.12:
            with contextlib.suppress(RuntimeError, AssertionError):  # no such fake or meta tensors
                change_all(rng, call)
            continue
        name = rng.choice(names)
        value, kind = call.arguments[name], call.types.get(name, "")
        if kind.startswith("List["):
            value = changed_list(rng, call, name, value, kind == "List[float]")
        elif kind == "Tensor":
            value = changed_tensor(rng, call, name, value)
        elif kind == "str":
            value = change.string(rng)
            call.changes.append(f"{name}: {str(value)[:10]!r}")
        else:
            value = changed_number(rng, call, name)
        call.arguments[name] = value
    return call


# --- what a call should do ---------------------------------------------------------------


def usable(t: Any) -> bool:
    """Whether the kernels can read it at all."""
    return (
        isinstance(t, Tensor)
        and t.layout == torch.strided
        and not t.is_nested
        and not t.is_quantized
        and t.device.type == "cpu"
        and not is_fake(t)
        and in_storage(t)
    )


def in_storage(t: Tensor) -> bool:
    if t.numel() == 0:
        return True
    last = t.storage_offset() + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def is_number(x: Any) -> bool:
    try:
        return isinstance(x, (int, float)) and bool(math.isfinite(x) or True)
    except OverflowError:
        return False


def wrong_arguments(call: Call) -> set[str]:
    """The arguments of which an error has to name one; none: the call is right."""
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
                or (kind == "str" and x not in STRINGS[name])
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
                expected = len(a[first]) * (2 if name in TWO_PER_PAIR else 1)
                value = a.get(name)
                if kind.startswith("List[") and isinstance(value, (list, tuple)):
                    wrong |= {name, first} if len(value) != expected else set()
    wrong |= wrong_shapes(call, lists)
    if call.written:
        wrong |= wrong_to_write(call, lists)
    return wrong


STRINGS = {"onto": ("A", "B"), "norm_scope": ("layer", "global")}


def wrong_numbers(a: dict[str, Any]) -> set[str]:
    """Of those that are one per pair or factor."""
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
    """Shapes and types that do not belong together; both sides may be named."""
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
    target = "A" if call.arguments.get("onto", "B") == "A" else "B"
    first = "ema" if call.operator == "foreach_bound" else "A"
    for i in range(count):
        A, B = of(first, i), of("B", i)
        for name, t in ((first, A), ("B", B)):
            if t is not None and (t.dim() != 2 or t.dtype not in DTYPES):
                wrong.add(name)
        if A is not None and B is not None and A.dim() == B.dim() == 2:
            if A.shape[0] != B.shape[1] or (first == "A" and A.dtype != B.dtype):
                wrong.update((first, "B"))
            if not 1 <= A.shape[0] <= 256:
                wrong.add(first)
            if min(*A.shape, *B.shape) == 0 and first == "A":
                wrong.update(("A", "B"))
        if first == "ema":
            continue
        check("grad_A", i, "A", i)
        check("grad_B", i, "B", i)
        check("clean", i, target, i)
        check("ema", i, target, i, average_dtype)
        pairs = len(lists.get("A", ()))
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


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wrong_to_write(call: Call, lists: dict[str, Any]) -> set[str]:
    """Not contiguous, part of something else that is given, or recorded by autograd."""
    wrong: set[str] = set()
    ranges = []
    for name, tensors in lists.items():
        for t in tensors:
            if not usable(t):
                continue
            writes = name in call.written
            if writes and (not t.is_contiguous() or t.is_neg() or t.is_conj()):
                wrong.add(name)
            if writes and call.mode == "grad" and t.requires_grad:
                wrong.add(name)
            if t.is_contiguous() and not t.is_neg() and not t.is_conj() and t.numel():
                start = t.data_ptr()
                ranges.append((start, start + t.numel() * t.element_size(), writes, name))
    furthest = [(0, ""), (0, "")]  # of all so far, of what is written
    target = "A" if call.arguments.get("onto", "B") == "A" else "B"
    targets = {
        (t.data_ptr(), t.numel() * t.element_size()) for t in lists.get(target, ()) if usable(t)
    }
    for start, end, writes, name in sorted(ranges):
        if name == "clean" and (start, end - start) in targets:
            continue  # the target may stand for its clean values
        reach, other = furthest[0 if writes else 1]
        if reach > start:
            wrong.update((name, other))
        furthest[0] = max(furthest[0], (end, name))
        if writes:
            furthest[1] = max(furthest[1], (end, name))
    return wrong


# --- what it did -------------------------------------------------------------------------


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for x in value for t in tensors_of(x)]
    return []


def state_of(value: Any) -> list[tuple]:
    """Everything of an argument that a call could change, down to the memory around views."""
    states: list[tuple] = []
    if isinstance(value, (list, tuple)):
        states.append(tuple(map(id, value)))
    for t in tensors_of(value):
        state: tuple = (t.dtype, t.layout, t.requires_grad)
        if t.layout == torch.sparse_coo:
            t = t._values()
        if t.is_nested:
            t = t.values()
        if t.layout == torch.strided and t.device.type == "cpu" and not is_fake(t):
            storage = t.untyped_storage()
            content = (
                ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
            )
            version = None if t.is_inference() else t._version
            state += (t.shape, t.stride(), t.storage_offset(), storage.data_ptr(), content, version)
        states.append(state)
    return states


def is_fake(t: Tensor) -> bool:
    return isinstance(t, torch._subclasses.FakeTensor)


def check_result(call: Call, before: dict[str, Any], result: Any) -> str:
    """Compares with the reference where it has one answer; says what was compared."""
    a = call.arguments
    if virtual(call):
        assert all(t.device.type == "meta" or is_fake(t) for t in tensors_of(result))
        return "traced"
    for t in tensors_of(result):
        assert not t.requires_grad or call.operator in PUBLIC
    if call.operator == "foreach_bound":
        return check_bound(a, result)
    E, norms = result if call.operator in PUBLIC else (None, result)
    norms = norms.detach().reshape(-1)
    lists = [plain(before[name]) for name in PAIR]
    single = call.operator == "perturb"
    if single:
        lists = [[t] for t in lists]
    pairs = [Pair(*row) for row in zip(*lists, scalings(a), strict=True)]
    onto, scope = a.get("onto", "B"), a.get("norm_scope", "layer")
    targets = [p.B if onto == "B" else p.A for p in pairs]
    assert norms.shape == (len(pairs),)
    wide = bool(pairs) and all(p.A.dtype == torch.float64 for p in pairs)
    assert norms.dtype == (torch.float64 if wide else torch.float32)
    if E is not None:
        E = [t.detach() for t in ([E] if single else E)]
        for e, target, norm in zip(E, targets, norms, strict=True):
            assert e.shape == target.shape and e.dtype == target.dtype
            assert bool(e.isfinite().all()), "E is not finite"
            if not (norm > 0 and norm.isfinite()):
                assert not bool(e.any()), "E must be zero where the norm is"
    else:
        assert all(
            bool(new.isfinite().all()) or not bool(old.isfinite().all())
            for new, old in zip(a["ema"], plain(before["ema"]), strict=True)
        ), "something not finite has entered ema"
    options = (float(a["rho"]), onto, scope, a.get("rtol"))
    if not pairs or not all(comparable(p, options[3]) for p in pairs):
        return "checked"
    expected, expected_norms = reference.foreach_perturb(*zip(*pairs, strict=True), *options)
    dtypes = [p.A.dtype for p in pairs]
    if any(0 < float(norm) < 1e-30 for norm in expected_norms):
        return "checked"  # zero where norms are float32
    largest = min(torch.finfo(dtype).max for dtype in dtypes)
    if not all(float(x.norm()) <= largest / 2 for x in (*expected, expected_norms)):
        return "checked"  # the norm is infinite then
    assert_near("norm", norms, expected_norms, torch.float32)
    if E is not None:
        for e, x in zip(E, expected, strict=True):
            assert_near("E", e, x, e.dtype)
    elif call.operator == "foreach_perturb_ema_":
        beta = float(a["beta"])
        averages = zip(a["ema"], plain(before["ema"]), expected, expected_norms, strict=True)
        for new, old, x, norm in averages:
            if small(old):  # it stays as it is where the norm is zero
                mixed = (1 - beta) * old.double() + beta * x if norm > 0 else old
                assert_near("ema", new.detach(), mixed, new.dtype)
    elif call.operator == "foreach_adamw_step_" and torch.float16 not in dtypes:
        usual = {"onto": onto, "norm_scope": scope}
        given = {k: plain(v) if tensors_of(v) else v for k, v in before.items() if k != "rtol"}
        if a.get("rtol") is None and all(small(t) for t in tensors_of(list(given.values()))):
            with torch.enable_grad(), torch.inference_mode(False):
                after, _ = one_after_another({**usual, **given})
            for name in (*call.written[:4], "exp_avg", "exp_avg_sq", "step"):
                for new, x in zip(tensors_of(a[name]), tensors_of(after[name]), strict=True):
                    assert_near(name, new.detach(), x.double(), new.dtype)
    return "compared"


def check_bound(a: dict[str, Any], factors: Tensor) -> str:
    assert factors.shape == (len(a["ema"]),)
    pairs = list(zip(plain(a["B"]), plain(a["ema"]), scalings(a), strict=True))
    if not all(small(t) for b, e, _ in pairs for t in (b, e)):
        return "checked"
    norms = [abs(s) * float((b.double() @ e.double()).norm()) for b, e, s in pairs]
    if a.get("norm_scope", "layer") == "global":
        norms = [math.hypot(*norms)] * len(norms)
    rho = float(a["rho"])
    expected = [rho / norm if norm > rho else 1.0 for norm in norms]
    assert_near("factors", factors, torch.tensor(expected), torch.float32)
    return "compared"


def scalings(a: dict[str, Any]) -> list[float]:
    value = a["scaling"]
    return [float(x) for x in value] if isinstance(value, (list, tuple)) else [float(value)]


def plain(value: Any) -> Any:
    """Copies without strides, flags and subclasses."""
    if isinstance(value, Tensor):
        return value.detach().resolve_conj().resolve_neg().clone().as_subclass(Tensor)
    return [plain(x) for x in value]


def small(t: Tensor) -> bool:
    t = t.double().abs()
    return bool(((t == 0) | ((t > 1e-6) & (t < 1e4))).all())


def comparable(pair: Pair, rtol: float | None) -> bool:
    return all(small(t) for t in pair[:4]) and (
        not all(bool(t.any()) for t in pair[:2]) or not ambiguous(pair, rtol)
    )


TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_near(name: str, value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    size = float(expected.double().norm()) + 1e-3
    error = float((value.double() - expected.double()).norm()) / size
    assert error <= TOLERANCE[dtype], f"{name} is off by {error:.2g}"


def copy_of(call: Call) -> dict[str, Any]:
    """The arguments before a call; of the tensors only those that can be copied."""

    def of(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [of(y) for y in x]
        return x.detach().clone() if usable(x) else x

    return {name: of(value) for name, value in call.arguments.items()}


def judge(call: Call) -> str:
    """Runs a call; gives its outcome. AssertionError if it is none of those that are promised."""
    wrong = wrong_arguments(call)
    before = copy_of(call)
    states = {name: state_of(value) for name, value in call.arguments.items()}
    try:
        result = call.run()
    except Exception as error:
        changed = [n for n, v in call.arguments.items() if state_of(v) != states[n]]
        assert not changed, f"{changed} changed though the call raised {error!r}"
        return judge_error(call, wrong, error)
    assert call.unsure or not wrong, f"no error, though {sorted(wrong)} are wrong"
    changed = [
        n
        for n, v in call.arguments.items()
        if n not in call.written and state_of(v) != states[n] and not shares(call, n)
    ]
    assert not changed, f"{changed} changed"
    if wrong and not virtual(call):
        return "left to torch"
    return check_result(call, before, result)


def virtual(call: Call) -> bool:
    """Whether a tensor has no memory: fake kernels run then."""
    tensors = tensors_of(list(call.arguments.values()))
    return any(t.device.type == "meta" or is_fake(t) for t in tensors)


def shares(call: Call, name: str) -> bool:
    """Whether an argument lies in the storage of one that is written."""
    written = {
        t.untyped_storage().data_ptr()
        for n in call.written
        for t in filter(usable, tensors_of(call.arguments.get(n)))
    }
    given = filter(usable, tensors_of(call.arguments[name]))
    return any(t.untyped_storage().data_ptr() in written for t in given)


def judge_error(call: Call, wrong: set[str], error: Exception) -> str:
    text = str(error)
    kind = type(error).__name__
    if call.unsure and isinstance(error, AssertionError):
        assert "FakeTensor" in text, error
        return f"{kind} of torch"
    assert call.unsure or wrong, f"a right call raised {error!r}"
    # The fake kernels raise in Python; the real ones know RuntimeError alone.
    allowed = (TypeError, ValueError) if call.public else RuntimeError
    if call.unsure or (virtual(call) and not call.public):
        allowed = (TypeError, ValueError, RuntimeError)
    assert isinstance(error, (allowed, NotImplementedError)), repr(error)
    assert type(error) in (TypeError, ValueError, RuntimeError, NotImplementedError), repr(error)
    if type(error) is NotImplementedError and not call.public:
        return kind  # torch's own words on what it dispatches to no kernel
    if call.unsure and not wrong:
        return f"{kind}, left to torch"
    if "expected at most" in text:  # torch's words for a surplus argument
        return kind
    named = [name for name in wrong if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    assert named, f"names none of {sorted(wrong)}: {kind}: {text[:500]}"
    assert IN_WORDS.search(text), f"does not say what is expected: {text[:500]}"
    return kind


def state_of_torch() -> tuple:
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return *(k.raw_repr() for k in keys), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def main(seed: int, first: int = 0, count: int = 10_000) -> int:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable()  # fake tensors log each error
    outcomes: Counter[str] = Counter()
    wrong = 0
    before = state_of_torch()
    for number in range(first, first + count):
        call = make_call(seed, number)
        # Seen by who started this process if it ends or hangs here.
        print(f"{seed} {number}: {call}"[:4000].encode("ascii", "backslashreplace").decode())
        sys.stdout.flush()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            outcomes[judge(call)] += 1
            assert state_of_torch() == before, "the call changed the state of torch"
        except Exception as error:  # of the call or of this file: both are to be looked at
            wrong += 1
            print(
                f"WRONG {error if isinstance(error, AssertionError) else repr(error)}".encode(
                    "ascii", "backslashreplace"
                ).decode(),
                flush=True,
            )
            if wrong > 50:
                break
        faulthandler.cancel_dump_traceback_later()
        change.KEPT.clear()
    print(json.dumps(outcomes))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
