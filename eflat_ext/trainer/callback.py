"""EFlat-LoRA as a callback of Trainer, with whatever optimizer it makes."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from eflat_ext.perturbation import EFlatPerturbation
from eflat_ext.perturbation.checkpoint import Around
from eflat_ext.perturbation.settings import Rho, Settings
from eflat_ext.perturbation.steps import living
from eflat_ext.stacklevel import stacklevel_of_user

from .figures import figures, is_of_training, perturbing

FILE = "eflat_perturbation.safetensors"  # in each checkpoint's folder


class EFlatCallback(TrainerCallback):
    """EFlat-LoRA for ``Trainer(..., callbacks=[EFlatCallback()])``.

    When training begins, an :class:`eflat_ext.EFlatPerturbation` is attached to the optimizer that
    the trainer made, of whatever kind, or to the engine that steps for it; when training ends, it
    is removed. The model is a PEFT model, which the trainer may have made of a ``peft_config``.

    Each checkpoint that holds the optimizer's state gets a file
    ``eflat_perturbation.safetensors`` with the moving averages, and a run that is resumed from it
    gives the same bits as one that was not interrupted. A second ``train()`` of one trainer goes on
    with the averages if the trainer goes on with its optimizer's state, as Trainer does unless it
    makes a new optimizer.

    The training log gets ``perturbation_norm`` and ``skipped_perturbations``, see
    :class:`PerturbationMixin`. So that other callbacks see them, this one moves to the front of the
    trainer's callbacks.

    To end the perturbation while a run goes on, call ``perturbation.remove()``; taking the callback
    out of the trainer does not end it.

    Args:
        rho, beta, onto, norm_scope, rtol: see :class:`eflat_ext.EFlatPerturbation`.

    Attributes:
        settings: the arguments.
        perturbation: that of the training that is under way, else None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range.

    When training begins, it raises ValueError for a model without LoRA, a second EFlatCallback, an
    optimizer of this package or with an attached perturbation, and averages of other layers or
    shapes; and what :meth:`eflat_ext.EFlatPerturbation.attach` raises.
    """

    def __init__(
        self,
        rho: Rho = 0.05,
        beta: float = 0.9,
        onto: str = "B",
        norm_scope: str = "layer",
        rtol: float | None = None,
    ) -> None:
        self.settings = Settings(rho, onto, norm_scope, rtol, beta)
        self.settings.radius(0)  # raises what a schedule raises
        self.perturbation: EFlatPerturbation | None = None
        self._saving: Around | None = None
        # What the last training left: its optimizer or engine, and the perturbation's state.
        self._stepped: weakref.ref[Any] | None = None
        self._state: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no part in the training under way.
        return {
            **vars(self),
            "perturbation": None,
            "_saving": None,
            "_stepped": None,
            "_state": None,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach a perturbation to the trainer's optimizer, and load its state."""
        trainer, checkpoint = _running_trainer()
        self._leave()  # a training that was interrupted
        stepping = _what_steps(trainer)
        self._check_alone(trainer, stepping)
        saved = self._state if self._stepped and self._stepped() is stepping else None
        if checkpoint is not None:
            saved = _load(Path(checkpoint))
        perturbation = _attached(self.settings, trainer, stepping, saved, checkpoint)
        self.perturbation, self._stepped = perturbation, weakref.ref(stepping)
        if not trainer.args.save_only_model:
            # Before the trainer's state, which makes a checkpoint complete, and is written by the
            # processes that save; before the checkpoint is uploaded, too.
            self._saving = Around(state, "save_to_json", self._save)
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
            callbacks.insert(0, self)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the perturbation's figures to those of training."""
        if self.perturbation is None or not is_of_training(logs or {}):
            return
        found = figures(self.perturbation)
        logs.update(found)
        last = state.log_history[-1] if state.log_history else {}
        if is_of_training(last) and last.get("step") == state.global_step:  # a copy, made before
            last.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the perturbation."""
        self._leave()

    def _leave(self) -> None:
        saving, perturbation = self._saving, self.perturbation
        self._saving = self.perturbation = None  # also if what follows raises
        if saving is not None:
            saving.remove()
        if perturbation is not None:
            self._state = None
            try:
                self._state = perturbation.state_dict()
            finally:
                perturbation.remove()

    def _check_alone(self, trainer: Any, stepping: Any) -> None:
        found = sum(isinstance(one, EFlatCallback) for one in trainer.callback_handler.callbacks)
        if found > 1:
            raise ValueError(f"a trainer must have one EFlatCallback at most, got {found}")
        own = perturbing(trainer.optimizer)
        if own is not None:
            raise ValueError(
                "a trainer with an EFlatCallback must have a plain optimizer, got "
                f"{type(own).__name__}: use either the callback or an optimizer of eflat_ext"
            )
        if any(one.claimant() is stepping for one in living):
            raise ValueError(
                "a trainer with an EFlatCallback must have a plain optimizer, got one with an "
                "attached perturbation: use either the callback or attach"
            )

    def _save(self, state: Any, save_to_json: Any, json_path: str) -> None:
        if self.perturbation is not None:
            _write(self.perturbation.state_dict(), Path(json_path).with_name(FILE))
        save_to_json(json_path)


def _running_trainer() -> tuple[Any, str | None]:
    """Return the trainer whose training begins, and the folder that it resumes from.

    From the stack: Trainer tells its callbacks neither. SetFit also hands them another model and
    other arguments than the trainer's.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop":
            found = frame.f_locals
            if "self" in found and "resume_from_checkpoint" in found:
                return found["self"], found["resume_from_checkpoint"]
        frame = frame.f_back
    raise RuntimeError("EFlatCallback must be a callback of a transformers.Trainer that trains")


def _what_steps(trainer: Any) -> Any:
    """Return a trainer's optimizer as it was before accelerate wrapped it, or its engine."""
    if trainer.is_deepspeed_enabled:
        return trainer.model_wrapped
    optimizer = trainer.optimizer
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer


def _attached(
    settings: Settings, trainer: Any, stepping: Any, saved: Any, checkpoint: str | None
) -> EFlatPerturbation:
    """Return a perturbation of the trainer's model with a saved state, if there is one."""
    s = settings
    perturbation = EFlatPerturbation(trainer.model, s.rho, s.beta, s.onto, s.norm_scope, s.rtol)
    try:
        if trainer.is_deepspeed_enabled:
            from eflat_ext.engines import deepspeed

            _fit(perturbation, saved, checkpoint)  # before, as the engine has loaded its own part
            deepspeed.attach(stepping, perturbation)
        else:
            perturbation.attach(stepping, save_state=False)
            _fit(perturbation, saved, checkpoint)
    except BaseException:
        perturbation.remove()  # whoever holds the exception would let it wait for a pass
        raise
    return perturbation


def _fit(perturbation: EFlatPerturbation, saved: Any, checkpoint: str | None) -> None:
    if saved is None:
        return
    try:
        perturbation.load_state_dict(saved)
    except ValueError as error:
        if checkpoint is None:
            raise
        raise ValueError(f"{Path(checkpoint) / FILE}: {error}") from error


# The file: the averages by factor; the counters are metadata.


def _write(state: dict[str, Any], path: Path) -> None:
    averages = {name: average.contiguous() for name, average in state["averages"].items()}
    counters = {name: str(state[name]) for name in ("steps", "skipped")}
    unfinished = path.with_name(path.name + ".tmp")
    save_file(averages, unfinished, {"format": "pt", **counters})
    os.replace(unfinished, path)


def _load(folder: Path) -> dict[str, Any] | None:
    path = folder / FILE
    if not path.exists():
        warnings.warn(
            f"the checkpoint {folder} has no {FILE}: EFlat-LoRA's averages start at zero",
            UserWarning,
            stacklevel=stacklevel_of_user(),
        )
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata()
            counters = {name: int(metadata[name]) for name in ("steps", "skipped")}
            return {"averages": {name: file.get_tensor(name) for name in names}, **counters}
    except (SafetensorError, LookupError, TypeError) as error:
        raise ValueError(f"{path} must be a file that EFlatCallback wrote: {error!r}") from error
