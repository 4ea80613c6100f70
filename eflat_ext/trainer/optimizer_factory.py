"""Make the optimizers for ``Trainer(..., optimizer_cls_and_kwargs=...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from eflat_ext.optim.base import PerturbingOptimizer
from eflat_ext.optim.factories import (
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)

Base: TypeAlias = type[Optimizer] | TrainingArguments
Hook: TypeAlias = tuple["OptimizerFactory", dict[str, Any]]


def eflat_optimizer(base: Base, *, model: nn.Module | None = None, **kwargs: Any) -> Hook:
    """Make EFlat-LoRA for ``Trainer(..., optimizer_cls_and_kwargs=eflat_optimizer(arguments))``.

    Parameters are grouped as Trainer groups them: no weight decay for biases and norms.

    Args:
        base: a class of optimizers, which takes its arguments from ``kwargs``, with the meaning
            and the defaults of that class; or the trainer's ``TrainingArguments``, whose
            optimizer, learning rate, weight decay and so on hold where ``kwargs`` does not say
            otherwise.
        model: the PEFT model; only transformers before 5, whose Trainer does not hand it over,
            needs it here.
        **kwargs: rho, beta, onto and the other arguments of :func:`create_eflat_optimizer`, and
            those of the base optimizer.

    Raises:
        TypeError: ``base`` is neither. What else is wrong is raised when Trainer calls it.
    """
    return OptimizerFactory(create_eflat_optimizer, base, model, kwargs), {}


def flat_optimizer(base: Base, *, model: nn.Module | None = None, **kwargs: Any) -> Hook:
    """Make Flat-LoRA for a trainer with :class:`PerturbationMixin`; see :func:`eflat_optimizer`."""
    return OptimizerFactory(create_flat_optimizer, base, model, kwargs), {}


def lora_sam_optimizer(base: Base, *, model: nn.Module | None = None, **kwargs: Any) -> Hook:
    """Make LoRA-SAM for a trainer with :class:`PerturbationMixin`; see :func:`eflat_optimizer`."""
    return OptimizerFactory(create_lora_sam_optimizer, base, model, kwargs), {}


class OptimizerFactory:
    """Factory that Trainer calls to make the optimizer; see :func:`eflat_optimizer`.

    transformers 5 calls it without arguments and the result with the model. Before, it is called
    with groups of parameters.
    """

    def __init__(
        self,
        create: Callable[..., PerturbingOptimizer],
        base: Base,
        model: nn.Module | None,
        kwargs: dict[str, Any],
    ) -> None:
        is_class = isinstance(base, type) and issubclass(base, Optimizer)
        if not is_class and not isinstance(base, TrainingArguments):
            raise TypeError(
                "base must be a subclass of torch.optim.Optimizer or TrainingArguments, "
                f"got {base!r}"
            )
        self.create = create
        self.base = base
        self.model = model
        self.kwargs = kwargs

    def __call__(self, model: Any = None) -> Any:
        """Return the optimizer; without a model or groups, the factory itself.

        Raises:
            TypeError: called with groups, and there is no model.
            ValueError: the arguments name an optimizer that is not made of parameters alone.
        """
        if model is None:
            return self
        if not isinstance(model, nn.Module):
            # The groups, with the decay of the training arguments; the model gives the same ones.
            if self.model is None:
                raise TypeError(
                    "transformers before 5 does not hand the model to the optimizer's factory: "
                    "pass model=..."
                )
            model = self.model
        base, kwargs = self.base, dict(self.kwargs)
        if isinstance(base, TrainingArguments):
            kwargs.setdefault("weight_decay", base.weight_decay)
            base, of_arguments = _optimizer_of(base, model)
            kwargs = {**of_arguments, **kwargs}
        if "params" not in kwargs:
            kwargs["params"] = _groups(model, kwargs)
        return self.create(model, base, **kwargs)


def _optimizer_of(
    arguments: TrainingArguments, model: nn.Module
) -> tuple[type[Optimizer], dict[str, Any]]:
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    own = {"params", "model", "optimizer_dict"} & kwargs.keys()
    if own or not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ValueError(
            "arguments must name an optimizer that is made of a list of parameters, got "
            f"optim={arguments.optim}"
        )
    return cls, kwargs


def _groups(model: nn.Module, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return Trainer's two groups, the second without weight decay."""
    # It takes nothing from its trainer; called so, the rule is that of the installed version.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    first: dict[str, Any] = {"params": [p for n, p in trained if n in decayed]}
    if "weight_decay" in kwargs:
        first["weight_decay"] = kwargs["weight_decay"]
    return [first, {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0}]
