"""Options, optimizers and loops that the tests of perturbations share."""

from __future__ import annotations

from typing import Any

import torch
from models import (
    loss_of,
    train_on,
)
from torch import nn

from eflat_ext import create_eflat_optimizer

RHO, BETA, LR = 0.3, 0.8, 0.05
CLOSE: dict[str, float] = {"rtol": 1e-7, "atol": 1e-12}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=LR),
}


def eflat(model: nn.Module, base: Any = torch.optim.SGD, **options: Any) -> Any:
    options = {"lr": LR, "rho": RHO, "beta": BETA, **options}
    return create_eflat_optimizer(model, base, **options)


def train(model: nn.Module, optimizer: Any, data: Any, closures: bool = False) -> None:
    if closures:
        return train_on(model, optimizer, data)
    for batch in data:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
