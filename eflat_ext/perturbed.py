"""The life cycle of perturbed weights: when they are in the model, and how they come out again.

``PerturbedWeights`` puts a perturbation into some of a model's parameters for training forward
passes, and for what a backward pass computes of these again, and takes it out for everything else.
It keeps a copy of the clean values and copies it back: subtracting would not give the same bits,
and rebinding ``.data`` would break compiled graphs and sharded modules that hold the storage.

Between training forward passes the parameters themselves stay perturbed, since gradients of
accumulated micro-batches belong to one point and autograd forbids writing to them. So everything
that reads weights for keeps gets the clean values: ``state_dict`` a copy of them, loading and
guarded methods (merging) a real restore first. A copy of the model, deep or from a pickle, is clean
and carries an inert object (but one in the file format that torch had before 1.6, whose values are
read last).

``torch.compile`` traces the change of the weights into the forward pass and sets the flag that
records it after that pass: if the compiled code itself fails half way (out of memory), the
perturbation may stay in. Where this matters, call ``perturb`` before the forward pass.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from .dtensors import (
    distributed,
    fsdp_modules,
    local,
    refuse_flat_parameters,
    reshard,
    same_layout,
)
from .gradient_watch import GradientWatch
from .guards import MergesItself, RestoreFirst, RestoreToKeep
from .hooks import attached_to, belongs_to, detach
from .pairs import Slot
from .passes import holders, recomputing
from .targets import parameters_of


class PerturbedWeights:
    """Owns a model's perturbed parameters, their clean copies and every hook on the model.

    At every instant either the parameters are clean, or the object knows that they may not be
    and its copy is complete; an exception or an interrupt between any two steps loses nothing.

    Args:
        model: a forward pass of it, or of a module of it that holds all targets, perturbs in
            training mode and restores otherwise; so does one of a layer, by whatever method of the
            model it is called, unless it is compiled or sharded by FSDP2.
        targets: the parameters as (module, attribute name); looked up when used, since other
            libraries replace parameters.
        perturbation: adds the perturbation in place to the list of target parameters it is given
            (same order as ``targets``); called without gradients. It must not hold ``owner``.
        owner: on whose behalf this happens; when it is garbage, forward passes restore. If it is
            an optimizer, parameters that it does not train are left alone.
        idle: whether the perturbation adds zeros.
        guarded: methods as (module, method name) that find clean weights.
        kept: the same, but where a loss may hold what they return: with gradients.
        merging: modules whose forward passes call guarded methods for their own use, which then
            find the weights of that pass.
        layers: modules of which one in training mode makes it training mode, by default the
            targets'; the model's own flag would miss ``wrapper.module.eval()``.

    Attributes:
        enabled: whether training forward passes perturb.
        merging: how many forward passes are under way that merge for their own use.

    Raises:
        RuntimeError: another, living owner perturbs this model.
        ValueError: a target's module is none of the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Slot],
        perturbation: Callable[[list[Tensor]], None],
        owner: object,
        guarded: Iterable[Slot] = (),
        kept: Iterable[Slot] = (),
        merging: Iterable[nn.Module] = (),
        idle: Callable[[], bool] = bool,
        layers: Sequence[nn.Module] = (),
    ) -> None:
        for other in attached_to(model, PerturbedWeights):
            if other.alive:
                raise RuntimeError(
                    "model: its weights are perturbed by another optimizer already; call that "
                    "optimizer's remove_hooks() first"
                )
            other.remove(model)
        self.enabled = True
        self._visited = False
        self._watch: GradientWatch | None = None
        self._model: nn.Module | None = model
        self._slots = list(targets)
        self._layers = list(layers or (module for module, _ in targets))
        self._perturbation: Callable[[list[Tensor]], None] | None = perturbation
        self._suspended = 0
        self.merging = 0
        self._dirty = False  # the targets may differ from the copies
        self._applied = False  # the perturbation is in the targets, whole
        self._held = [getattr(*slot) for slot in self._slots]  # whose values were copied
        self._clean = [torch.empty_like(target) for target in self._held]
        self._idle = idle
        self._fsdp: list[Any] = []
        # Whether nobody can shard the model any more: its shards are what there is to look up.
        self._settled = False
        self._owner: weakref.ref[Any] | None = weakref.ref(owner, self._disable)
        self._hook(model)
        for module, name in guarded:
            RestoreFirst(self, module, name).install()
        for module, name in kept:
            RestoreToKeep(self, module, name).install()
        for module in merging:
            MergesItself(self, module, "forward").install()

    @property
    def alive(self) -> bool:
        """Whether hooks are on a model and the owner exists."""
        return self._owner is not None and self._owner() is not None

    @property
    def applied(self) -> bool:
        """Whether the perturbation is in the parameters now."""
        return self._applied

    @property
    def visited(self) -> bool:
        """Whether gradients are of the perturbed weights, since someone last set it to False.

        A training forward pass found these in place, or gradients came while they were watched;
        without hooks, whoever perturbs sets it.
        """
        return self._visited or (self._watch is not None and self._watch.found())

    @visited.setter
    def visited(self, visited: bool) -> None:
        self._visited = visited

    def watch_gradients(self) -> None:
        """Let a gradient that comes before the weights are restored count as a visit.

        For passes that no hook sees: calls of other methods than ``forward``.
        """
        if self._applied and self._watch is None:
            self._watch = GradientWatch(self._held)

    def targets(self) -> list[Tensor]:
        """The parameters now; what was there last where a module holds none any more."""
        self.settle()
        reshard(self._fsdp)
        return [getattr(*slot, held) for slot, held in zip(self._slots, self._held, strict=True)]

    def perturb(self) -> None:
        """Copy the clean values and add the perturbation; nothing if it is in already."""
        if self._applied or self._suspended or self._perturbation is None:
            return
        self.restore()
        with torch.no_grad():
            targets = self.targets()
            if self._foreign(targets):
                return
            copies = self._copies(targets)
            _copy(copies, targets)
            self._held, self._clean = targets, copies
            self._dirty = True
            self._perturbation(targets)
            self._applied = True

    def settle(self) -> bool:
        """Until the first forward pass: find FSDP2's modules, let none of their hooks be first.

        Returns:
            Whether one was: the forward pass that is beginning has gathered weights already.
        """
        if self._settled or self._model is None or not distributed():
            return False
        refuse_flat_parameters(self._model)
        self._fsdp = fsdp_modules(self._model)
        late = False
        for module in self._holders if self._fsdp else ():
            hooks: Any = module._forward_pre_hooks
            own = [key for key, hook in hooks.items() if belongs_to(hook) is self]
            for key in own:
                late |= next(iter(hooks)) != key
                hooks.move_to_end(key, last=False)
        return late

    def restore(self) -> None:
        """Copy the clean values back, bit for bit; nothing if they are there already."""
        if not self._dirty:
            return
        self._end()
        with torch.no_grad():
            _copy(self._held, self._clean)
        self._dirty = False
        reshard(self._fsdp)

    @contextmanager
    def restored_by(self, stepped: Sequence[int]) -> Iterator[list[Tensor]]:
        """For code that puts the clean values of some targets back itself, and goes on from there.

        Args:
            stepped: indices of those targets; the others are restored here.

        Yields:
            Their clean values: the copies, or the targets themselves where those are clean. If the
            code raises, :meth:`restore` is still due, for all targets.
        """
        targets = self.targets()
        copied = {}
        if self._dirty:
            copied = {i: copy for i, copy in enumerate(self._clean) if self._held[i] is targets[i]}
        self._end()
        yield [copied.get(i, targets[i]) for i in stepped]
        if self._dirty:
            with torch.no_grad():
                for i in set(range(len(targets))) - (copied.keys() & set(stepped)):
                    _copy([self._held[i]], [self._clean[i]])
            self._dirty = False
            reshard(self._fsdp)

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Clean weights within, whatever runs there; perturbed again afterwards if they were."""
        applied, suspended = self._applied, self._suspended
        self.restore()
        try:
            self._suspended = suspended + 1
            yield
        finally:
            self._suspended = suspended
            if applied:
                self.perturb()
                self.watch_gradients()

    def remove(self, model: nn.Module | None = None) -> None:
        """Restore, and take every hook off (``model`` where this object was copied with it)."""
        self.restore()
        model = model or self._model
        self._owner = None
        if model is not None:
            detach(model, self)

    def __getstate__(self) -> dict[str, Any]:
        # What a copy of the model needs to become clean; nothing that would perturb it, and no
        # reference that would make a copied layer drag the whole model along.
        held = self._held if self._dirty else []
        return {"held": held, "clean": self._clean[: len(held)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.enabled = self._visited = False
        self._model = self._perturbation = self._owner = self._watch = None
        self._layers, self._slots, self._fsdp = [], [], []
        self._settled, self._idle = True, bool
        self._suspended = self.merging = 0
        self._held, self._clean = state["held"], state["clean"]
        self._dirty = bool(self._held)
        self.restore()
        self._held = self._clean = []

    def _foreign(self, targets: Sequence[Tensor]) -> bool:
        """Whether these are a caller's own, in torch.func.functional_call."""
        if not all(isinstance(target, Parameter) for target in targets):
            return True
        owner = self._owner() if self._owner is not None else None
        if not isinstance(owner, Optimizer) or torch.compiler.is_compiling():
            return False
        trained = {id(parameter) for parameter in parameters_of(owner.param_groups)}
        return not any(id(target) in trained for target in targets)

    def _disable(self, _: object) -> None:
        self.enabled = False

    def _end(self) -> None:
        """From here on the perturbation is not whole; whether a gradient came is remembered."""
        self._visited, self._watch, self._applied = self.visited, None, False

    def _copies(self, targets: list[Tensor]) -> list[Tensor]:
        """The buffers, renewed where a parameter has moved or changed its type."""
        for index, (copy, target) in enumerate(zip(self._clean, targets, strict=True)):
            if (
                copy.dtype != target.dtype
                or copy.device != target.device
                or copy.shape != target.shape
                or not same_layout(copy, target)
            ):
                with torch.inference_mode(False):
                    self._clean[index] = torch.empty_like(target)
        return self._clean

    def _hook(self, model: nn.Module) -> None:
        self._holders = holders(model, [module for module, _ in self._slots])
        for module in self._holders:
            module.register_forward_pre_hook(self._before_forward, prepend=True)
        for layer in set(self._layers) - set(self._holders):
            layer.register_forward_pre_hook(self._before_layer, prepend=True)
        index_of = {id(target): index for index, target in enumerate(self._held)}
        for module in model.modules():
            # Not only the slots' own modules: a tied parameter is saved under each of its names.
            owned = [
                (name, index_of[id(parameter)])
                for name, parameter in module._parameters.items()
                if id(parameter) in index_of
            ]
            if owned:
                hook = functools.partial(self._save_clean, owned)
                module.register_state_dict_post_hook(hook)
                module.register_load_state_dict_pre_hook(self._before_load)

    def _training(self) -> bool:
        """Whether passes are to be perturbed now."""
        return self.enabled and not self._suspended and any(one.training for one in self._layers)

    def _before_forward(self, module: nn.Module, args: object) -> None:
        if self._training():
            if not self._applied and getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "torch.nn.DataParallel copied the weights before they were perturbed: use "
                    "DistributedDataParallel, or call optimizer.train() before each forward pass"
                )
            if not self._settled and distributed() and self._sharded_late():
                return
            self.perturb()
            self._visited |= self._applied
        else:
            self.restore()

    def _before_layer(self, layer: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        if recomputing():
            if self._visited and self.enabled and not self._suspended and not self._applied:
                self._perturb_again()
        elif (layer.training or self._dirty) and not self._whole():
            # It entered by another method than forward.
            self.settle()
            if not self._fsdp:  # whose modules have gathered weights already
                self._before_forward(layer, args)

    def _whole(self) -> bool:
        """Whether the weights are as the mode wants them, and a training pass has been noted."""
        return (self._applied and self._visited) if self._training() else not self._dirty

    def _perturb_again(self) -> None:
        """For the backward pass of a perturbed one, since which the weights were restored."""
        if self._fsdp:
            raise RuntimeError(
                "weights were restored between the forward and the backward pass of a checkpointed "
                "model that is sharded by FSDP2; evaluate it after backward()"
            )
        self.perturb()

    def _sharded_late(self) -> bool:
        """At the first forward pass: whether FSDP2's hook ran first, which is no harm at rest."""
        late = self.settle()
        self._settled = True
        if late and not self._applied and not self._idle():
            raise RuntimeError(
                "the model was sharded after its optimizer had been constructed: call "
                "optimizer.train() before the first forward pass"
            )
        self._visited |= late
        return late

    def _save_clean(
        self,
        owned: list[tuple[str, int]],
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
    ) -> None:
        if not self._dirty:
            return
        for name, index in owned:
            # None where an embedding's adapter was deleted since.
            key, parameter = prefix + name, module._parameters.get(name)
            if key in state_dict and parameter is not None and parameter is self._held[index]:
                value = self._clean[index].to(parameter.device, parameter.dtype, copy=True)
                if isinstance(state_dict[key], Parameter):  # keep_vars=True
                    value = Parameter(value, parameter.requires_grad)
                state_dict[key] = value

    def _before_load(self, *_: object) -> None:
        self.restore()


def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_([local(t) for t in to], [local(value) for value in values])
