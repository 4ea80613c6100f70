"""Whether parameters have got gradients since: for passes that no hook on a module sees."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


class GradientWatch:
    """Remembers the gradients that some parameters have now, and tells later ones from them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._before = [_state(parameter.grad) for parameter in parameters]

    def found(self) -> bool:
        """Whether a parameter has another gradient now, or the same tensor with other values."""
        for parameter, (gradient, version) in zip(self._parameters, self._before, strict=True):
            # A traced pass cannot hold the comparison: any gradient counts there.
            if parameter.grad is not None and (
                torch.compiler.is_compiling()
                or gradient is None
                or parameter.grad is not gradient()
                or parameter.grad._version != version
            ):
                return True
        return False

    def replaced(self) -> bool:
        """Whether a parameter has another tensor for its gradient now."""
        return any(
            parameter.grad is not None and (gradient is None or parameter.grad is not gradient())
            for parameter, (gradient, _) in zip(self._parameters, self._before, strict=True)
        )


def _state(gradient: Tensor | None) -> tuple[weakref.ref[Tensor] | None, int]:
    if gradient is None or torch.compiler.is_compiling():
        return None, 0
    return weakref.ref(gradient), gradient._version
