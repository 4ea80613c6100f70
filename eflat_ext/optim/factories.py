"""Make the base optimizers of the factories: of a class, over what a model trains."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


def make_base(
    model: Any, optimizer_cls: type[Optimizer], params: Any, options: dict[str, Any]
) -> Optimizer:
    """Return a base optimizer of ``params``, or else of all that the model trains.

    Raises:
        TypeError: ``optimizer_cls`` is no class of optimizers, or the model no module.
        ValueError: the model trains nothing.
    """
    if isinstance(optimizer_cls, Optimizer):
        raise TypeError(
            "optimizer_cls must be a class of optimizers, got an instance of "
            f"{type(optimizer_cls).__name__}: EFlatLoRA(model, base) takes one as its base"
        )
    if not callable(optimizer_cls):
        raise TypeError(
            "optimizer_cls must be a class of optimizers, such as torch.optim.AdamW, got "
            f"{optimizer_cls!r}"
        )
    return optimizer_cls(trainable_parameters(model) if params is None else params, **options)


def trainable_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Return what a model trains.

    Raises:
        TypeError, ValueError: the model is no module, or trains nothing.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(
            f"model must have trainable parameters, got {type(model).__name__} without any"
        )
    return trainable
