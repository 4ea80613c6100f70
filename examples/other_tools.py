"""Attach EFlat-LoRA where a tool makes the optimizer by a function that it is given.

fastai's Learner takes such a function, ``opt_func``. Without fastai, a learner of its kind stands
in here: it makes the optimizer of groups of parameters, and anneals the learning rate and the first
beta in one cycle. The data are scikit-learn's digits.

    pip install scikit-learn cyclopts
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cyclopts
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

from eflat_ext import EFlatPerturbation


class Learner:
    """A training loop that knows nothing of this package."""

    def __init__(self, model: nn.Module, opt_func: Callable[..., Any], lr: float) -> None:
        self.model, self.lr = model, lr
        # Those of the head learn faster.
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        heads = [p for name, p in trained if "head" in name]
        others = [p for name, p in trained if "head" not in name]
        self.opt = opt_func([{"params": others, "lr": lr}, {"params": heads, "lr": 3 * lr}])
        self.factors = [group["lr"] / lr for group in self.opt.param_groups]

    def fit_one_cycle(self, x: Tensor, y: Tensor, steps: int) -> None:
        self.model.train()
        for step in range(steps):
            wave = (1 - math.cos(2 * math.pi * (step + 1) / (steps + 1))) / 2
            for group, factor in zip(self.opt.param_groups, self.factors, strict=True):
                group["lr"] = self.lr * factor * wave
                group["betas"] = (0.95 - 0.1 * wave, group["betas"][1])
            rows = torch.arange(32 * step, 32 * step + 32) % len(x)
            self.opt.zero_grad()
            nn.functional.cross_entropy(self.model(x[rows]), y[rows]).backward()
            self.opt.step()

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        return (self.model.eval()(x).argmax(1) == y).float().mean().item()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["first", "second"], modules_to_save=["head"])
    return get_peft_model(Net(), config)


def opt_func_of(model: nn.Module, rho: float | None) -> Callable[..., Any]:
    """Return what makes an AdamW of groups, with a perturbation of the model unless rho is None."""

    def opt_func(groups: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups, **options)
        if rho is not None:
            EFlatPerturbation(model, rho=rho).attach(optimizer)
        return optimizer

    return opt_func


def main(rho: float = 0.05, steps: int = 150) -> None:
    """Train plain LoRA, EFlat-LoRA at rho 0, and EFlat-LoRA; print accuracies on held-out digits.

    Args:
        rho: Radius of the perturbation.
        steps: Optimizer steps, 32 images each.
    """
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(data.images).float().flatten(1) / 8 - 1)[order]
    y = torch.tensor(data.target)[order]
    weights = []
    for name, radius in (("LoRA", None), ("rho 0", 0.0), (f"rho {rho}", rho)):
        model = adapted()
        learner = Learner(model, opt_func_of(model, radius), lr=3e-3)
        learner.fit_one_cycle(x[:1200], y[:1200], steps)
        print(f"{name}: accuracy {learner.accuracy(x[1200:], y[1200:]):.3f}")
        weights.append([p.detach().clone() for p in model.parameters()])
    for name, other in (("at rho 0", weights[1]), (f"at rho {rho}", weights[2])):
        differing = sum(int((p != q).sum()) for p, q in zip(weights[0], other, strict=True))
        print(f"{name}, {differing} weights differ from LoRA's")


if __name__ == "__main__":
    cyclopts.run(main)
