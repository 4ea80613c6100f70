"""Hugging Face Trainer: the optimizers as one line, and a mixin for two gradients and logging.

Training, evaluating, saving and resuming need nothing from here: any Trainer takes an optimizer of
this package. This is for users who let Trainer make the optimizer, for the methods whose step
needs two gradients, and for the perturbation's figures in the log.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
except ImportError as error:
    raise ImportError("eflat_ext.trainer needs transformers: pip install transformers") from error

from .optim.base import PerturbingOptimizer
from .optim.factories import (
    create_eflat_optimizer,
    create_flat_optimizer,
    create_lora_sam_optimizer,
)
from .optim.two_gradients import TwoGradients

__all__ = [
    "OptimizerFactory",
    "PerturbationMixin",
    "eflat_optimizer",
    "flat_optimizer",
    "last_complete_checkpoint",
    "lora_sam_optimizer",
]

# By these, trainers of TRL choose among the inputs that they made for several micro-batches.
COUNTERS = {"_step", "_buffer_step"}

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


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in a trainer's output folder, None if there is none.

    For ``trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))``
    after a run was killed; without a checkpoint, it starts at the beginning. Given True, Trainer
    takes the newest folder, and fails if the run was killed while it wrote that. It writes
    ``trainer_state.json`` last: a checkpoint where that file is whole is complete.
    """
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            try:
                json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            found[int(path.name.partition("-")[2])] = str(path)
    return found[max(found)] if found else None


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


@dataclass
class _MicroBatch:
    """Arguments of a ``training_step``, and what ``_prepare_inputs`` returned in the first pass."""

    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prepared: list[tuple[Any, dict[str, int]]] = field(default_factory=list)


class PerturbationMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """For a Trainer class: two-gradient steps, and the perturbation in the log.

    ``class FlatTrainer(PerturbationMixin, Trainer): pass``, likewise for subclasses of Trainer
    such as TRL's. With ``FlatLoRA`` or ``LoRASAM``, the micro-batches of a step run a second time,
    with the arguments they came with, at the perturbed weights; the loss that is reported is the
    first one, at the clean weights. Inputs are prepared once, for both passes: what a trainer
    generates or draws for them is the same. With any other optimizer, training is as without the
    mixin.

    The training log gets two more entries, which cost nothing between logs:

    * ``perturbation_norm``: mean over the pairs of ``optimizer.perturbation_norms``, the norm of
      the full-space gradient at the last step. With EFlat-LoRA it comes after clipping, with the
      others before it, and multiplied by the loss scale under fp16.
    * ``skipped_perturbations``: how many there have been, of all layers and steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._micro_batches: list[_MicroBatch] = []
        super().__init__(*args, **kwargs)
        self.add_callback(_StepBounds(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; a step that is interrupted leaves the weights clean."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._start_anew()

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one micro-batch; the last one of a step adds the second gradients of all of them.

        Raises:
            RuntimeError: the second pass might see other inputs than the first one, as the
                trainer does not prepare them by ``_prepare_inputs``, equally often in each.
        """
        optimizer = _perturbing(self.optimizer)
        if not isinstance(optimizer, TwoGradients):
            return super().training_step(model, inputs, *args, **kwargs)
        micro_batch = _MicroBatch(copy.copy(inputs), args, kwargs)  # a step may take entries out
        with self._preparing_by(partial(self._remember, micro_batch, self._prepare_inputs)):
            loss = super().training_step(model, inputs, *args, **kwargs)
        if not micro_batch.prepared:
            raise _unlike("training_step does not call it")
        self._micro_batches.append(micro_batch)
        if self.accelerator.sync_gradients:
            optimizer.first_step()
            self._second_gradients(model)
        return loss

    def _second_gradients(self, model: nn.Module) -> None:
        counters = self._counters()
        try:
            while self._micro_batches:
                micro_batch = self._micro_batches.pop(0)
                # Ranks exchange the sum once, as at the first gradients.
                wait = self.accelerator.no_sync(model) if self._micro_batches else nullcontext()
                with wait, self._preparing_by(partial(self._hand_out, micro_batch)):
                    inputs = micro_batch.inputs
                    super().training_step(model, inputs, *micro_batch.args, **micro_batch.kwargs)
                if micro_batch.prepared:
                    raise _unlike("the second pass calls it less often than the first one")
        finally:
            self.__dict__.update(counters)

    @contextmanager
    def _preparing_by(self, prepare: Callable[..., Any]) -> Iterator[None]:
        """Make a context in which ``prepare`` takes the place of ``_prepare_inputs``."""
        # Set on the object: subclasses of this class may override the method, too.
        own = self.__dict__
        before = {name: own[name] for name in own.keys() & {"_prepare_inputs"}}
        own["_prepare_inputs"] = prepare
        try:
            yield
        finally:
            del own["_prepare_inputs"]
            own.update(before)

    def _remember(
        self, micro_batch: _MicroBatch, prepare: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with self._preparing_by(prepare):  # what is prepared within this is part of it
            prepared = prepare(*args, **kwargs)
        micro_batch.prepared.append((_copied(prepared), self._counters()))
        return prepared

    def _hand_out(self, micro_batch: _MicroBatch, *args: Any, **kwargs: Any) -> Any:
        if not micro_batch.prepared:
            raise _unlike("the second pass calls it more often than the first one")
        prepared, counters = micro_batch.prepared.pop(0)
        self.__dict__.update(counters)
        return prepared

    def _counters(self) -> dict[str, int]:
        return {name: self.__dict__[name] for name in self.__dict__.keys() & COUNTERS}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the perturbation's figures among those of training."""
        optimizer = _perturbing(self.optimizer)
        if optimizer is not None and "loss" in logs:
            norms = list(optimizer.perturbation_norms.values())
            if norms:
                logs["perturbation_norm"] = torch.stack(norms).mean().item()
            logs["skipped_perturbations"] = int(optimizer.skipped_perturbations)
        super().log(logs, *args, **kwargs)

    def _start_anew(self) -> None:
        """Forget a step that was interrupted, stopped, or skipped by a scaler."""
        self._micro_batches.clear()
        optimizer = _perturbing(self.optimizer)
        if isinstance(optimizer, TwoGradients):
            optimizer.abandon_step()


class _StepBounds(TrainerCallback):
    def __init__(self, trainer: PerturbationMixin) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._start_anew()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._start_anew()


def _copied(data: Any) -> Any:
    """Copy containers but not tensors: losses pop entries, label smoothing the labels."""
    if isinstance(data, MutableMapping):
        copied = copy.copy(data)
        for name, value in data.items():  # transformers' ModelOutput has no update
            copied[name] = _copied(value)
        return copied
    return type(data)(map(_copied, data)) if type(data) in (list, tuple) else data


def _unlike(reason: str) -> RuntimeError:
    return RuntimeError(
        "PerturbationMixin: both passes must see the same inputs, those that _prepare_inputs "
        f"returned in the first one, but {reason}"
    )


def _perturbing(optimizer: Any) -> PerturbingOptimizer | None:
    """Return the optimizer itself, or the one within accelerate's wrappers; None for another."""
    while optimizer is not None and not isinstance(optimizer, PerturbingOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
