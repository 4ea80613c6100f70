"""Claim LoRA factors of a model for a perturbation, follow them, and release them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eflat_ext.lora import LoraPair, Slot, find_pairs, held, lora_layers, whole_shape

from . import steps
from .dtensors import fsdp_modules, is_dtensor, refuse_flat_parameters, reshard
from .gather import Layout
from .layer_forward import PerturbedFactor, PerturbedLayer, Row, Switch, detach, perturbed_layer
from .operands import Target
from .targets import check_whole, choose_targets, parameters_of

_TAKEN_OVER = "a newer perturbation of the same weights has taken over"
_numbers = itertools.count()  # of perturbations, in the order in which they were made


class ClaimedFactors:
    """The factors of a model's pairs that one perturbation perturbs, from claiming to the end.

    Nothing is claimed when it is made: :meth:`claim` does, or else the first training pass. A newer
    perturbation of the same weights takes over; it also ends, with a warning, when an optimizer
    that does not belong to it steps them.

    Args:
        model: a PEFT model with LoRA layers.
        carriers: the factors that are perturbed, "A", "B" or both.
        whole_pairs: leave out pairs of which not all carriers can be perturbed.

    Attributes:
        pairs: the LoRA pairs that are perturbed.
        factors: their perturbed factors, each once: the experts of a layer share theirs.
        targets: the perturbed factors of each pair, all A, then all B.
        ended: why nothing is perturbed any more; empty while it lives.
        optimizers: those whose steps of the perturbed parameters do not end it.
        steps: how many updates there have been.
        steps_of: for each optimizer, the number of updates at its last step; used only where
            nothing was attached.
    """

    def __init__(self, model: nn.Module, carriers: Sequence[str], whole_pairs: bool) -> None:
        if isinstance(model, nn.Module):
            refuse_flat_parameters(model)
        self._candidates = self.pairs = find_pairs(model)
        check_whole(self.pairs)
        self.factors: list[PerturbedFactor] = []
        self.targets: list[Target] = []
        self.ended, self.steps = "", 0
        self.optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.steps_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._model, self._carriers, self._whole_pairs = model, list(carriers), whole_pairs
        self._switch = Switch()
        self._parameters: dict[Slot, Any] = {}  # of the pairs, as last seen
        self._layers: list[PerturbedLayer] = []
        self._claimed = False
        self._claimant: Callable[[], Optimizer | None] = _nobody
        self._number = next(_numbers)
        self._claim_all = partial(_claim_all, weakref.ref(self))
        self._wait()

    def check(self) -> None:
        """Raise RuntimeError, with the reason, if it has ended."""
        if self.ended:
            raise RuntimeError(f"this perturbation has ended: {self.ended}")

    def claim(self, optimizer: Optimizer | None = None) -> None:
        """Take over the pairs whose perturbed factor an optimizer trains; all pairs without one.

        Raises:
            ValueError: there is none; factors A and B of a pair are on different devices.
            TypeError: factors A and B of a pair have different dtypes.
            NotImplementedError: factors are sharded in another layout than ``SUPPORTED``.
        """
        trained = None
        if optimizer is not None:
            if not self._claimed:
                self._release()  # one that is refused waits no more
            reshard(fsdp_modules(self._model))  # so that modules hold what optimizers train
            trained = parameters_of(optimizer.param_groups)
        chosen = choose_targets(self._candidates, trained, self._carriers, self._whole_pairs)
        self._check([pair for pair, _ in chosen])
        self._release()
        self.pairs = [pair for pair, _ in chosen]
        self._parameters = {
            slot: slot[0]._parameters[slot[1]] for p in self.pairs for slot in p.slots.values()
        }
        known = {(factor.module, factor.name): factor for factor in self.factors}
        factor_at = {
            slot: known.get(slot) or self._new_factor(slot)
            for _, slots in chosen
            for slot in slots.values()
        }
        for slot, factor in factor_at.items():
            factor.parameter = self._parameters[slot]
        self.factors = list(factor_at.values())
        self.targets = [
            Target(i, pair, carrier, factor_at[slots[carrier]])
            for carrier in self._carriers
            for i, (pair, slots) in enumerate(chosen)
            if carrier in slots
        ]
        self._prepare_factors()
        if optimizer is not None:
            self._claimant = weakref.ref(optimizer)
            self.optimizers.add(optimizer)
        for other in list(steps.living):
            if other.parameter_ids() & self.parameter_ids():
                other.end(_TAKEN_OVER)
                if optimizer is not None and other.claimant() is optimizer:
                    other.leave_optimizer()
        self._install()
        self._claimed = True
        steps.living.add(self)
        steps.watch()

    def _prepare_factors(self) -> None:
        """Prepare the factors that were claimed, before a pass can see them."""

    def _claim_once(self) -> None:
        if self._claimed or self.ended:
            return
        mine = {id(held(pair.slots[f])) for pair in self._candidates for f in self._carriers}
        if any(one._number > self._number and one.parameter_ids() & mine for one in steps.living):
            self.end(_TAKEN_OVER)  # while it was waiting
        else:
            self.claim()

    def end(self, reason: str) -> None:
        """Perturb no more; :meth:`check` tells the reason."""
        if self.ended:
            return
        self.ended = reason
        self._release()

    def remove(self) -> None:
        """Leave the model and the optimizer for good."""
        self.end("it was removed")
        self.leave_optimizer()

    def leave_optimizer(self) -> None:
        """Remove all hooks from the optimizer."""

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Make a context in which training passes are not perturbed."""
        before = self._switch.cleaned
        try:
            try:
                self._switch.cleaned = before + 1
                yield
            finally:
                self._switch.cleaned = before
        finally:
            self._switch.cleaned = before  # twice: a signal may end the first one

    def parameter_ids(self) -> set[int]:
        """Return the ids of the perturbed parameters."""
        return {id(factor.parameter) for factor in self.factors}

    @property
    def attached(self) -> bool:
        """True if an optimizer was given to :meth:`claim`."""
        return self._claimant is not _nobody

    def others(self) -> list[Any]:
        """Return the other living perturbations, of any model."""
        return [one for one in steps.living if one is not self]

    def shares(self, optimizer: Any) -> bool:
        """Return whether other perturbations were claimed for the same optimizer."""
        return any(one.claimant() is optimizer for one in self.others())

    def claimant(self) -> Optimizer | None:
        """Return the optimizer for which the pairs were claimed."""
        return self._claimant()

    def follow_parameters(self) -> None:
        """Follow parameters that were replaced, as by ``fully_shard``, moved or given another type.

        Raises:
            NotImplementedError: the older FSDP has replaced them.
        """
        if any(len(whole_shape(parameter)) < 2 for parameter in self._parameters.values()):
            refuse_flat_parameters(self._model)
        trained = self._trained_ids()
        perturbed = {(factor.module, factor.name): factor for factor in self.factors}
        for slot, known in self._parameters.items():
            factor, now = perturbed.get(slot), slot[0]._parameters.get(slot[1])
            if now is None or now is known or _is_gathered(now, known):
                continue
            if factor is None or trained is None or id(now) in trained:
                self._parameters[slot] = now
                if factor is not None:
                    factor.parameter = now
        for factor in self.factors:
            parameter = factor.parameter
            if (parameter.device, parameter.dtype) != factor.fitted_to:
                factor.fit(self._dtype(parameter.dtype))

    def _check_parameters(self) -> None:
        trained = self._trained_ids()
        for _, pair, carrier, _ in self.targets:
            module, name = slot = pair.slots[carrier]
            known, now = self._parameters[slot], module._parameters.get(name)
            if pair.scaling == 0:  # its adapter was deleted
                continue
            if now is not known and not (now is not None and _is_gathered(now, known)):
                refuse_flat_parameters(self._model)
                raise RuntimeError(
                    f"factor {carrier} of {pair.group} was replaced or removed since its optimizer "
                    "was made (load_state_dict(assign=True), pruning): it must be the parameter "
                    "that the optimizer trains; make the optimizer anew"
                )
            if trained is not None and id(known) not in trained:
                raise RuntimeError(
                    "the optimizer must train the model's own parameters, got one without "
                    f"factor {carrier} of {pair.group}; for an engine that replaces parameters by "
                    "some of its own (DeepSpeed ZeRO) give it the plain optimizer, and attach an "
                    "EFlatPerturbation to the engine: eflat_ext.engines.deepspeed.attach"
                )

    def _trained_ids(self) -> set[int] | None:
        """Return the ids of what the optimizer trains that the pairs were claimed for."""
        claimant = self._claimant()
        if claimant is None:
            return None
        return {id(p) for group in claimant.param_groups for p in group["params"]}

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type of what is added to factors of a type."""
        return torch.float64 if dtype == torch.float64 else torch.float32

    def _new_factor(self, slot: Slot) -> PerturbedFactor:
        parameter = self._parameters[slot]
        dtype = self._dtype(parameter.dtype)
        with torch.inference_mode(False):
            E = torch.zeros(whole_shape(parameter), dtype=dtype, device=parameter.device)
        factor = PerturbedFactor(*slot, E, self._switch)
        factor.was_swapped = partial(_was_swapped, weakref.ref(self))
        return factor

    def _check(self, pairs: Sequence[LoraPair]) -> None:
        """Raise an error, see :meth:`claim`, unless these pairs can be perturbed."""
        Layout({f"factor {f} of {p.name}": p.parameter(f) for p in pairs for f in "AB"})

    def _wait(self) -> None:
        """Let the first training pass of any layer claim all pairs."""
        for layer in dict.fromkeys(pair.layer for pair in self.pairs):
            perturbed = perturbed_layer(layer)
            perturbed.waiting.append(self._claim_all)
            self._layers.append(perturbed)
        self._finalizer = weakref.finalize(self, detach, self._layers, [], self._claim_all)
        self._finalizer.atexit = False

    def _install(self) -> None:
        factor_of = {id(factor.parameter): factor for factor in self.factors}
        for layer in lora_layers(self._model):
            # In the layers within it, too: attention merges them itself. Under each name of theirs.
            rows = [
                Row(factor_of[id(parameter)], module, name, path)
                for path, module in layer.named_modules()
                for name, parameter in module._parameters.items()
                if id(parameter) in factor_of
            ]
            if rows:
                perturbed = perturbed_layer(layer)
                perturbed.rows += rows
                self._layers.append(perturbed)
        self._finalizer = weakref.finalize(self, detach, self._layers, self.factors)
        self._finalizer.atexit = False

    def _release(self) -> None:
        """Take everything off the model."""
        self._finalizer.detach()
        steps.living.discard(self)
        detach(self._layers, self.factors, self._claim_all)
        self._layers = []

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, it is tied to its model: save its "
            "state_dict() and construct it on the other model"
        )


def _nobody() -> None:
    """Stand in for the optimizer of a perturbation that was claimed for none."""


def _is_gathered(now: Tensor, known: Tensor) -> bool:
    """Return whether a parameter is FSDP2's gathered form of another."""
    return is_dtensor(known) and not is_dtensor(now)


def _was_swapped(perturbation: weakref.ref[ClaimedFactors], factor: PerturbedFactor) -> bool:
    """Return whether another parameter was put into the optimizer, as when a model is sharded."""
    found = perturbation()
    trained = None if found is None else found._trained_ids()
    return trained is not None and id(factor.parameter) not in trained


def _claim_all(perturbation: weakref.ref[ClaimedFactors]) -> None:
    found = perturbation()
    if found is not None:
        found._claim_once()
