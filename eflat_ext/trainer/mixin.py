"""A mixin for Trainer classes: two-gradient steps, and the perturbation in the log."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer, TrainerCallback

from eflat_ext.optim.two_gradients import TwoGradients

from .figures import figures, is_of_training, perturbing

# By these, trainers of TRL choose among the inputs that they made for several micro-batches.
COUNTERS = {"_step", "_buffer_step"}


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
        optimizer = perturbing(self.optimizer)
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
        optimizer = perturbing(self.optimizer)
        if optimizer is not None and is_of_training(logs):
            logs.update(figures(optimizer.perturbation))
        super().log(logs, *args, **kwargs)

    def _start_anew(self) -> None:
        """Forget a step that was interrupted, stopped, or skipped by a scaler."""
        self._micro_batches.clear()
        optimizer = perturbing(self.optimizer)
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
