"""Random wrong calls of the operators, each made from a valid one by one to three changes.

    python python_tests/support/fuzz_operators.py SEED [FIRST [COUNT]]    prints outcomes as JSON

A call follows from its seed and number alone. What it should do is said by
:func:`fuzz_oracle.wrong_arguments`: an empty set means a result like the reference's, another one
an error that names one of its arguments.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import math
import re
import sys
import warnings
from collections import Counter
from typing import Any

import fuzz_arguments as change
import torch
from adamw_case import one_after_another
from fuzz_calls import PUBLIC, Call, is_fake, make_call, tensors_of, usable, virtual
from fuzz_oracle import wrong_arguments
from strategies import Pair, ambiguous, points, targets
from torch import Tensor

from eflat_ext import reference

SECONDS = 60  # that a call may take
PAIR = ("A", "B", "grad_A", "grad_B")
IN_WORDS = re.compile(r"must|expected|Expected|missing|Unknown|unexpected|takes", re.DOTALL)


def state_of(value: Any) -> list[tuple]:
    """Return everything of an argument that a call could change, with the memory around views."""
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


def check_result(call: Call, before: dict[str, Any], result: Any) -> str:
    """Compare with the reference where it has one answer; return the kind of comparison."""
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
    pairs = points(pairs, plain(before.get("E", [])), onto)
    assert norms.shape == (len(pairs),)
    wide = bool(pairs) and all(p.A.dtype == torch.float64 for p in pairs)
    assert norms.dtype == (torch.float64 if wide else torch.float32)
    if E is not None:
        E = [t.detach() for t in ([E] if single else E)]
        for i, (e, target) in enumerate(zip(E, targets(pairs, onto), strict=True)):
            norm = norms[i % len(pairs)]
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
    if not pairs or not all(comparable(p, options[3], onto, options[0]) for p in pairs):
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
        averages = zip(a["ema"], plain(before["ema"]), expected, strict=True)
        for i, (new, old, x) in enumerate(averages):
            if small(old):  # it stays as it is where the norm is zero
                moves = expected_norms[i % len(pairs)] > 0
                mixed = (1 - beta) * old.double() + beta * x if moves else old
                assert_near("ema", new.detach(), mixed, new.dtype)
    elif call.operator == "foreach_adamw_step_" and torch.float16 not in dtypes:
        usual = {"onto": onto, "norm_scope": scope}
        given = {k: plain(v) if tensors_of(v) else v for k, v in before.items() if k != "rtol"}
        refused = any(x < 0 for x in a["weight_decay"])  # by torch's own AdamW
        if (
            not refused
            and a.get("rtol") is None
            and all(small(t) for t in tensors_of(list(given.values())))
        ):
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
    if any(0 < norm < 1e-150 for norm in norms):
        return "checked"  # its square is zero
    rho = float(a["rho"])
    expected = [rho / norm if norm > rho else 1.0 for norm in norms]
    assert_near("factors", factors, torch.tensor(expected), torch.float32)
    return "compared"


def scalings(a: dict[str, Any]) -> list[float]:
    value = a["scaling"]
    return [float(x) for x in value] if isinstance(value, (list, tuple)) else [float(value)]


def plain(value: Any) -> Any:
    """Return copies without strides, flags and subclasses."""
    if isinstance(value, Tensor):
        return value.detach().resolve_conj().resolve_neg().clone().as_subclass(Tensor)
    return [plain(x) for x in value]


def small(t: Tensor) -> bool:
    t = t.double().abs()
    return bool(((t == 0) | ((t > 1e-6) & (t < 1e4))).all())


def comparable(pair: Pair, rtol: float | None, onto: str, rho: float) -> bool:
    return all(small(t) for t in pair[:4]) and (
        not all(bool(t.any()) for t in pair[:2]) or not ambiguous(pair, rtol, onto, rho)
    )


TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_near(name: str, value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    size = float(expected.double().norm()) + 1e-3
    error = float((value.double() - expected.double()).norm()) / size
    assert error <= TOLERANCE[dtype], f"{name} is off by {error:.2g}"


def copy_of(call: Call) -> dict[str, Any]:
    """Return the arguments before a call, with copies of the tensors that can be copied."""

    def of(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [of(y) for y in x]
        return x.detach().clone() if usable(x) else x

    return {name: of(value) for name, value in call.arguments.items()}


def judge(call: Call) -> str:
    """Run a call and return its outcome; AssertionError if none of the promised ones."""
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


def shares(call: Call, name: str) -> bool:
    """Return whether an argument lies in the storage of one that is written."""
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
    # torch's words for a surplus argument, and for a fake tensor beside a subclass.
    if any(words in text for words in ("expected at most", "Multiple dispatch failed")):
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
