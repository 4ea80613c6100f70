"""A LoRA model whose training passes run at B + 1."""

from __future__ import annotations

from typing import Any

import torch
from models import Mlp, assert_same_bits, lora_mlp, lora_weights, weights
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from eflat_ext import EFlatPerturbation

X = torch.linspace(-1, 1, 24).reshape(2, 12)


def assert_nothing_in_place(model: nn.Module) -> None:
    """Assert that no value hides a parameter."""
    for name, module in model.named_modules():
        assert not module.__dict__.keys() & module._parameters.keys(), name


class Case:
    """A LoRA MLP inside two wrappers, and its perturbation by ones."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        config: Any = {"modules_to_save": None, "init_lora_weights": False}
        self.inner: Any = lora_mlp(torch.float32, **config) if inner is None else inner
        self.model = nn.Sequential(nn.Sequential(self.inner))
        self.B = lora_weights(self.inner)
        self.perturbation = EFlatPerturbation(self.model)
        self.put(1.0)
        self.before = weights(self.inner)

    @property
    def layers(self) -> list[Any]:
        base = self.inner.base_model.model
        return [base.up, base.down]

    def put(self, value: float) -> None:
        self.perturbation.put({B: torch.full_like(B, value) for B in lora_weights(self.inner)})

    def plain(self, *added: float) -> nn.Module:
        """Return a model without a perturbation, with these numbers added to its factors B."""
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])
        other = get_peft_model(Mlp(), config).to(self.B[0].dtype)
        other.load_state_dict(self.before)
        with torch.no_grad():
            for B, value in zip(lora_weights(other), added or (0, 0), strict=True):
                B.add_(value)
        return other

    def assert_runs_at(self, *added: float, x: Tensor = X) -> None:
        """Assert that passes run at the factors B plus these numbers, and change no parameter."""
        assert_same_bits({"": self.model(x).detach()}, {"": self.plain(*added).eval()(x).detach()})
        self.assert_clean()

    def assert_perturbed(self, x: Tensor = X) -> None:
        self.assert_runs_at(1.0, 1.0, x=x)

    def assert_runs_clean(self, x: Tensor = X) -> None:
        self.assert_runs_at(x=x)

    def assert_clean(self) -> None:
        """Assert that every parameter is unchanged."""
        assert_same_bits(weights(self.inner), self.before)
        assert_same_bits(dict(self.inner.state_dict()), self.before)
        assert_nothing_in_place(self.model)
