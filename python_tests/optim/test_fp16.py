"""A plain loop with autocast to float16 and a gradient scaler, in which some steps overflow."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import CREATE, assert_same_bits, batches, lora_mlp, loss_of, same_bits, weights
from torch import Tensor, nn

OVERFLOWING = (0, 3, 7)
STEPS = 11
DATA = batches(2 * STEPS, torch.float32)  # two micro-batches per step
METHODS = {
    "eflat": ("eflat", {}),
    "eflat unfused": ("eflat", {"fused_step": False}),
    "eflat onto A": ("eflat", {"onto": "A", "norm_scope": "global"}),
    "flat": ("flat", {}),
    "lora-sam": ("lora-sam", {}),
}


class Run:
    """A training run and a record of its steps; ``how`` None is a plain float32 loop."""

    def __init__(self, method: str, how: str | None) -> None:
        name, options = METHODS[method]
        self.how = how
        self.model = lora_mlp(torch.float32)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)  # onto A, B must not be zero
        self.start = weights(self.model)
        self.optimizer = CREATE[name](self.model, torch.optim.AdamW, lr=1e-2, rho=0.1, **options)
        self.two = name != "eflat"
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=how is not None)
        self.perturbations: list[dict[str, Tensor]] = []

    def backward(self, step: int, overflows: bool) -> None:
        factor = 1e7 if overflows and self.how == "loss" else 1.0
        for batch in DATA[2 * step : 2 * step + 2]:
            half = torch.autocast("cpu", torch.float16) if self.how else nullcontext()
            with half:
                loss = loss_of(self.model, batch) / 2
            self.scaler.scale(loss * factor).backward()

    def step(self, step: int) -> None:
        overflows = self.how is not None and step in OVERFLOWING
        clean = weights(self.model)
        before = self.everything()
        self.optimizer.zero_grad()
        if self.two:
            self.backward(step, False)
            self.optimizer.first_step()
        self.backward(step, overflows)
        if overflows and self.how == "gradient":
            next(p for p in self.model.parameters() if p.grad is not None).grad[0, 0] = torch.inf
        points, named = self.optimizer.points(), self.model.named_parameters()
        self.perturbations.append({n: points[p] - clean[n] for n, p in named if "lora_" in n})
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.how is not None:
            assert (self.scaler.get_scale() < scale) == overflows
        if overflows:  # nothing has changed
            assert_same_bits(self.everything(), before)
            self.optimizer.zero_grad()
            for parameter, point in self.optimizer.points().items() if self.two else ():
                assert same_bits(point, parameter)

    def everything(self) -> dict[str, Tensor]:
        """Return what a checkpoint would hold now."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        averages = getattr(self.optimizer, "averages", {})
        state |= {f"average {name}": value.clone() for name, value in averages.items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            state |= {f"{name} {index}": value.clone() for name, value in entry.items()}
        return state | {"skipped": self.optimizer.skipped_perturbations.clone()}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((found[name] - value).norm() / value.norm())
        for name, value in expected.items()
        if bool(value.any())
    }


@pytest.mark.proves(
    "Plain loops", "fp16 with `GradScaler`: overflowed steps touch nothing, the rest as in float32"
)
@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("method", METHODS)
def test_overflows_at_steps_0_3_and_7(method: str, how: str) -> None:
    run, exact = Run(method, how), Run(method, None)
    for step in range(STEPS):
        run.step(step)
        if step not in OVERFLOWING:
            exact.step(step)
    kept = [p for step, p in enumerate(run.perturbations) if step not in OVERFLOWING]
    assert len(kept) == len(exact.perturbations) == STEPS - 3
    rounding = [errors(*both) for both in zip(kept, exact.perturbations, strict=True)]
    assert sum(map(len, rounding)) >= 2 * (STEPS - 5)
    changes: list[dict[str, Any]] = [
        {n: p - each.start[n] for n, p in weights(each.model).items() if "base_layer" not in n}
        for each in (run, exact)
    ]
    rounding += [errors(*changes), errors(run.everything(), exact.everything())]
    worst = max(error for each in rounding for error in each.values())
    # Rounding to fp16 is 2^-11, relative, of each product; Adam's first steps are signs.
    assert 0 < worst < 8 * 2**-11, worst
    # An overflow at the first step, so that averages are zero and the point is the clean one.
    if not run.two:
        assert all(same_bits(p, torch.zeros_like(p)) for p in run.perturbations[0].values())
