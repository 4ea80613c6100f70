"""The optimizers' weights equal those of the reference loops, which follow the paper's text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import batches, lora_mlp, loss_of, relative_error, trainable
from torch import Tensor, nn

from eflat_ext import EFlatLoRA, FlatLoRA, LoRASAM, reference
from eflat_ext.lora import find_pairs

STEPS = 20
# After Adam's first step B has nearly equal rows, with singular value ratios of 1e-7, at which
# every Gram form loses digits that an exact pseudo-inverse keeps. The cutoff lies well above.
RTOL = 1e-5
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


def closure_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


def errors(
    method: str,
    base: str,
    dtype: torch.dtype = torch.float64,
    onto: str = "B",
    norm_scope: str = "layer",
    rho: float | Callable[[int], float] = 0.1,
    beta: float = 0.7,
    rtol: float = RTOL,
    steps: int = STEPS,
    **config: object,
) -> list[float]:
    """Return the relative differences to the reference loop after each step, weights and losses."""
    model, other = lora_mlp(dtype, **config), lora_mlp(dtype, **config)
    base_of_ours, its_base = BASES[base](trainable(model)), BASES[base](trainable(other))
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(other)]
    targets = [t for k, f in enumerate("AB") for t in [p[k] for p in pairs] if onto in (f, "both")]
    ema = [torch.zeros_like(t, dtype=torch.float64) for t in targets]
    if method == "eflat":
        ours = EFlatLoRA(
            model, base_of_ours, rho=rho, beta=beta, onto=onto, norm_scope=norm_scope, rtol=rtol
        )
    elif method == "flat":
        ours = FlatLoRA(model, base_of_ours, rho=rho, onto=onto, norm_scope=norm_scope, rtol=rtol)
    else:
        ours = LoRASAM(model, base_of_ours, rho=rho, norm_scope=norm_scope)
    found = []
    for step, batch in enumerate(batches(steps, dtype)):
        radius = rho(step) if callable(rho) else rho
        loss = ours.step(closure_for(model, ours, batch))
        closure = closure_for(other, its_base, batch)
        if method == "eflat":
            expected = reference.eflat_lora_step(
                pairs, its_base, closure, ema, radius, beta, onto, norm_scope, rtol
            )
        elif method == "flat":
            expected = reference.flat_lora_step(
                pairs, its_base, closure, radius, onto, norm_scope, rtol
            )
        else:
            expected = reference.lora_sam_step(pairs, its_base, closure, radius, norm_scope)
        found.append(max(relative_error(model, other), abs(loss.item() / expected.item() - 1)))
    return found


METHODS = [
    *(("eflat", onto) for onto in ("B", "A", "both")),
    *(("flat", onto) for onto in ("B", "A", "both")),
    ("lora-sam", "B"),
]
# The factor that bounds an average onto A is a float32 number.
BOUNDS = {("eflat", "A"): 1e-7, ("eflat", "both"): 1e-7}


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(("method", "onto"), METHODS)
def test_steps_equal_the_reference_in_float64(
    method: str, onto: str, base: str, norm_scope: str
) -> None:
    found = errors(method, base, onto=onto, norm_scope=norm_scope)
    assert max(found) <= BOUNDS.get((method, onto), 1e-9)


@pytest.mark.parametrize("method", ["eflat", "flat"])
def test_a_rank_above_256(method: str) -> None:
    assert max(errors(method, "adamw", steps=3, r=300)) <= 1e-9


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(("method", "onto"), METHODS)
def test_steps_equal_the_reference_in_float32(method: str, onto: str, base: str) -> None:
    """Rounding is 1e-7 per step; onto A, the pseudo-inverse of a small B magnifies it."""
    found = errors(method, base, dtype=torch.float32, onto=onto, rtol=1e-3)
    if onto == "both":  # at this rate, two gradients magnify differences tenfold per step
        found = found[:10]
    assert max(found) <= (5e-6 if onto == "B" else 5e-4)


@pytest.mark.parametrize(("method", "onto"), METHODS)
def test_steps_with_a_radius_that_changes_equal_the_reference(method: str, onto: str) -> None:
    found = errors(method, "sgd", onto=onto, rho=lambda step: 0.0 if step < 3 else 0.4 / step)
    assert max(found) <= BOUNDS.get((method, onto), 1e-9)


def test_the_methods_differ_by_more_than_the_bounds() -> None:
    """Their differences are far larger than the tests above allow."""
    paths = {}
    for name, make in {
        "plain": lambda model, base: base,
        "eflat": EFlatLoRA,
        "flat": FlatLoRA,
        "lora-sam": LoRASAM,
    }.items():
        paths[name] = lora_mlp()
        base = BASES["sgd"](trainable(paths[name]))
        optimizer = make(paths[name], base)
        for batch in batches(STEPS):
            optimizer.step(closure_for(paths[name], optimizer, batch))
    names = list(paths)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert relative_error(paths[one], paths[other]) > 1e-2, (one, other)
