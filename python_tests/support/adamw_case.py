"""Random calls of ``foreach_adamw_step_``, and their expected results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from strategies import RHO, Pair, added, all_near, all_same_bits, averages, generator, lists
from torch import Tensor, nn

ops = torch.ops.eflat
NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay")
WRITTEN = ("A", "B", "ema", "exp_avg", "exp_avg_sq", "step")
FOR_AVERAGES = (*Pair._fields, "E", "ema", "skipped", "rho", "beta")


def random_call(
    given: list[Pair],
    onto: str = "B",
    norm_scope: str = "layer",
    seed: int = 0,
    kind: str = "own",
) -> dict[str, Any]:
    """Return a call in the middle of training: every factor has moments, a step and numbers of its
    own. ``kind`` is that of :func:`strategies.added`."""
    g = generator(seed)

    def one_of(*values: float) -> list[float]:
        return [values[int(torch.randint(len(values), (), generator=g))] for _ in factors]

    def like(tensors: list[Tensor], size: float) -> list[Tensor]:
        draw = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in tensors]
        return [(x * size).to(t.dtype) for x, t in zip(draw, tensors, strict=True)]

    A, B, grad_A, grad_B, scaling = (list(column) for column in lists([p.clone() for p in given]))
    factors, gradients = [*A, *B], [*grad_A, *grad_B]
    ema = averages(given, onto)
    for average, noise in zip(ema, like(ema, 0.1), strict=True):
        average.copy_(noise)
    return {
        "A": A,
        "B": B,
        "grad_A": grad_A,
        "grad_B": grad_B,
        "E": added(ema, kind, seed),
        "ema": ema,
        "exp_avg": like(gradients, 0.5),
        "exp_avg_sq": [t.square() for t in like(gradients, 0.5)],
        "step": [torch.tensor(number) for number in one_of(0.0, 1.0, 7.0, 12345.0)],
        "skipped": torch.tensor(3),
        "scaling": scaling,
        "rho": RHO,
        "beta": 0.7,
        "lr": one_of(0.0, 1e-4, 1e-2, 0.5),
        "beta1": one_of(0.0, 0.3, 0.9, 0.99),
        "beta2": one_of(0.0, 0.9, 0.999),
        "eps": one_of(1e-8, 1e-3),
        "weight_decay": one_of(0.0, 0.01, 1.0),
        "onto": onto,
        "norm_scope": norm_scope,
    }


def adds_averages(call: dict[str, Any]) -> bool:
    """Return whether E holds the averages themselves."""
    return any(e is t for e, t in zip(call["E"], call["ema"], strict=False))


def mapped(call: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return the call with every tensor replaced; one that is given twice stays one."""
    made: dict[int, Tensor] = {}

    def of(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [of(x) for x in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = function(value)
        return made[id(value)]

    return {name: of(value) for name, value in call.items()}


def copied(call: dict[str, Any]) -> dict[str, Any]:
    """Return the call with copies of its tensors."""
    return mapped(call, Tensor.clone)


def on_meta(call: dict[str, Any]) -> dict[str, Any]:
    """Return the call with tensors that have no memory."""
    return mapped(call, lambda t: t.to("meta"))


def assert_same(
    call: dict[str, Any], other: dict[str, Any], names: Sequence[str] = WRITTEN
) -> None:
    """Assert that two calls hold the same tensors, bit for bit, in these of their lists."""
    for name in names:
        assert all_same_bits(call[name], other[name]), name


def assert_stepped(
    call: dict[str, Any], expected: dict[str, Any], names: Sequence[str], float64: float
) -> None:
    """Assert that a call has left behind what is expected, see :func:`one_after_another`: float64
    within a relative error, float32 within 2e-6, 16-bit types within their rounding."""
    assert int(call["skipped"]) == int(expected["skipped"])
    for name in names:
        for i, (x, y) in enumerate(zip(call[name], expected[name], strict=True)):
            finite = y.to(x.dtype).isfinite()
            assert torch.equal(x.isfinite(), finite), (name, i)
            x, y = (t.where(finite, 0) for t in (x, y))
            near = {"float64": float64, "roundings": 1.01}
            assert all_near([x], [y], [0.0], 2e-6, **near), (name, i)


def one_after_another(call: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Return the call as the operator has to leave it, from the average and torch's AdamW one after
    another, and the norms. 16-bit factors are float64, before rounding."""
    call = copied(call)
    norms = ops.foreach_perturb_ema_(
        **{name: call[name] for name in FOR_AVERAGES},
        onto=call["onto"],
        norm_scope=call["norm_scope"],
    )
    factors = [*call["A"], *call["B"]]
    for i, (factor, grad) in enumerate(zip(factors, call["grad_A"] + call["grad_B"], strict=True)):
        wide = torch.float64 if factor.dtype.itemsize == 2 else factor.dtype
        parameter = nn.Parameter(factor.to(wide))
        parameter.grad = grad.to(wide)
        numbers = {name: float(call[name][i]) for name in NUMBERS}
        betas = (numbers.pop("beta1"), numbers.pop("beta2"))
        adamw = torch.optim.AdamW([parameter], betas=betas, foreach=False, **numbers)
        state = {name: call[name][i].to(wide) for name in ("exp_avg", "exp_avg_sq")}
        adamw.state[parameter] = {**state, "step": call["step"][i]}
        adamw.step()
        call["A" if i < len(call["A"]) else "B"][i % len(call["A"])] = parameter.detach()
        for name in state:
            call[name][i] = state[name]
    return call, norms
