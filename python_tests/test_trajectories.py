"""The optimizers walk the paths of the reference loops, which are the paper word for word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import batches, lora_mlp, loss_of, relative_error, trainable
from torch import Tensor, nn

from eflat_ext import reference
from eflat_ext.optimizers import EFlatLoRA, FlatLoRA, LoRASAM
from eflat_ext.pairs import find_pairs

STEPS = 20
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
    rho: float = 0.1,
    beta: float = 0.7,
) -> list[float]:
    """Relative difference to the reference loop after each step, weights and losses."""
    model, other = lora_mlp(dtype), lora_mlp(dtype)
    base_of_ours, its_base = BASES[base](trainable(model)), BASES[base](trainable(other))
    pairs = [(pair.A, pair.B, pair.scaling) for pair in find_pairs(other)]
    ema = [torch.zeros_like(b if onto == "B" else a) for a, b, _ in pairs]
    if method == "eflat":
        kwargs = {"rho": rho, "beta": beta, "onto": onto, "norm_scope": norm_scope}
        ours = EFlatLoRA(model, base_of_ours, **kwargs)
    elif method == "flat":
        ours = FlatLoRA(model, base_of_ours, rho=rho, onto=onto, norm_scope=norm_scope)
    else:
        ours = LoRASAM(model, base_of_ours, rho=rho, norm_scope=norm_scope)
    found = []
    for batch in batches(STEPS, dtype):
        loss = ours.step(closure_for(model, ours, batch))
        closure = closure_for(other, its_base, batch)
        if method == "eflat":
            expected = reference.eflat_lora_step(
                pairs, its_base, closure, ema, rho, beta, onto, norm_scope
            )
        elif method == "flat":
            expected = reference.flat_lora_step(pairs, its_base, closure, rho, onto, norm_scope)
        else:
            expected = reference.lora_sam_step(pairs, its_base, closure, rho, norm_scope)
        found.append(max(relative_error(model, other), abs(float(loss / expected) - 1)))
    return found


@pytest.mark.parametrize("norm_scope", ["layer", "global"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("method", "onto"),
    [("eflat", "B"), ("eflat", "A"), ("flat", "B"), ("flat", "A"), ("lora-sam", "B")],
)
def test_float64(method: str, onto: str, base: str, norm_scope: str) -> None:
    found = errors(method, base, onto=onto, norm_scope=norm_scope)
    print(method, onto, base, norm_scope, found[11], found[-1])
    assert max(found[:12]) <= 1e-7
    # Rounding errors grow with the steps, fastest onto A, where (B^T)^+ is large at first.
    assert max(found) <= 1e-6
