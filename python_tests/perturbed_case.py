"""A model whose weights are perturbed by exactly one, for tests of the life cycle."""

from __future__ import annotations

import torch
from models import Mlp, assert_same_bits, same_bits, weights
from torch import Tensor, nn

from eflat_ext.perturbed import PerturbedWeights

X = torch.linspace(-1, 1, 24).reshape(2, 12)
NAMES = ("up.weight", "down.weight")


def add_one(targets: list[Tensor]) -> None:
    torch._foreach_add_(targets, [torch.ones_like(target) for target in targets])


class Owner:
    """Something that can be referenced weakly."""


class Case:
    """An MLP inside two wrappers, its ``up`` and ``down`` weights perturbed by 1."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.inner = Mlp()
        self.model = nn.Sequential(nn.Sequential(self.inner))
        self.before = weights(self.inner)
        self.owner = Owner()
        slots = [(self.inner.up, "weight"), (self.inner.down, "weight")]
        guarded = [(self.inner, "extra_repr")]
        self.weights = PerturbedWeights(self.model, slots, add_one, self.owner, guarded)

    def assert_clean(self) -> None:
        assert_same_bits(weights(self.inner), self.before)
        assert not self.weights.applied

    def assert_perturbed(self) -> None:
        now = weights(self.inner)
        for name, value in self.before.items():
            assert same_bits(now[name], value + 1 if name in NAMES else value), name
        assert self.weights.applied
