"""Methods of a model's modules that find clean weights, whenever they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .perturbed import PerturbedWeights


class RestoreFirst:
    """A method of one module that restores the weights before it runs."""

    def __init__(self, weights: PerturbedWeights, module: nn.Module, name: str) -> None:
        self.weights, self.module, self.name = weights, module, name
        self.patched = vars(module).get(name)  # another library's patch of the same method

    def install(self) -> None:
        setattr(self.module, self.name, self)

    def uninstall(self) -> None:
        delattr(self.module, self.name)
        if self.patched is not None:
            setattr(self.module, self.name, self.patched)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.weights.merging:
            self.weights.restore()
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        method = self.patched or getattr(type(self.module), self.name).__get__(self.module)
        return method(*args, **kwargs)


class RestoreToKeep(RestoreFirst):
    """A method whose outcome others keep, or a loss holds: then it is of that pass's weights."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self.call(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class MergesItself(RestoreFirst):
    """A forward pass that merges and unmerges: PEFT's attention modules have no other way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.weights.merging += 1
        try:
            return self.call(*args, **kwargs)
        finally:
            self.weights.merging -= 1
