"""Create the optimizers of all three methods, each around a new base optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from eflat_ext.perturbation.settings import Rho

from .eflat import EFlatLoRA
from .two_gradients import FlatLoRA, LoRASAM


def create_eflat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    rho: Rho = 0.05,
    beta: float = 0.9,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
    fused_step: bool = True,
    params: Any = None,
    **optimizer_kwargs: Any,
) -> EFlatLoRA:
    """Create an :class:`EFlatLoRA` around a new base optimizer of all trainable parameters.

    Args:
        model, rho, beta, onto, norm_scope, rtol, fused_step: see :class:`EFlatLoRA`.
        optimizer_cls: class of the base optimizer.
        params: parameters, named parameters or groups for it, in place of all trainable ones.
        **optimizer_kwargs: passed on to it (``lr`` and so on).

    Raises:
        TypeError: ``optimizer_cls`` is no class of optimizers; or as :class:`EFlatLoRA`.
        ValueError: the model trains nothing; or as :class:`EFlatLoRA`.
        ImportError, NotImplementedError: as :class:`EFlatLoRA`.
    """
    base = make_base(model, optimizer_cls, params, optimizer_kwargs)
    return EFlatLoRA(
        model,
        base,
        rho=rho,
        beta=beta,
        onto=onto,
        norm_scope=norm_scope,
        rtol=rtol,
        fused_step=fused_step,
    )


def create_flat_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    rho: Rho = 0.05,
    onto: str = "B",
    norm_scope: str = "layer",
    rtol: float | None = None,
    params: Any = None,
    **optimizer_kwargs: Any,
) -> FlatLoRA:
    """Create a :class:`FlatLoRA` around a new base; see :func:`create_eflat_optimizer`."""
    base = make_base(model, optimizer_cls, params, optimizer_kwargs)
    return FlatLoRA(model, base, rho=rho, onto=onto, norm_scope=norm_scope, rtol=rtol)


def create_lora_sam_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    rho: Rho = 0.05,
    norm_scope: str = "layer",
    params: Any = None,
    **optimizer_kwargs: Any,
) -> LoRASAM:
    """Create a :class:`LoRASAM` around a new base; see :func:`create_eflat_optimizer`."""
    base = make_base(model, optimizer_cls, params, optimizer_kwargs)
    return LoRASAM(model, base, rho=rho, norm_scope=norm_scope)


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
