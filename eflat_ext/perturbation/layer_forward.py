"""Run LoRA layers at perturbed factors without writing a parameter.

``LayerForward`` takes the place of a layer's ``forward``. While it runs, ``factor + E`` stands in
the ``__dict__`` of the module that holds the factor, where attribute look-up finds it before the
parameter. Autograd's gradient of ``factor + E`` is the factor's gradient, so gradients are those of
the perturbed point and land in ``parameter.grad``; whatever reads the parameter at any other moment
finds it as the optimizer left it. Forward hooks would not do: torch runs hooks with
``always_call=True`` after an ``Exception`` alone, not after Ctrl-C or ``sys.exit``.

Engines that shard parameters may gather a factor when the module within the layer that owns it
runs (DeepSpeed ZeRO 3, ``fully_shard`` of that module). ``OwnerForward`` adds E to those then.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from eflat_ext.lora import CONVOLUTIONS

from .dtensors import is_dtensor, is_gathered_by, laid_out_as

# Attribute of a module that torch.nn.DataParallel calls to copy it.
_REPLICATE = "_replicate_for_data_parallel"


class Switch:
    """A flag that the factors of a perturbation share: whether training passes are perturbed.

    Attributes:
        on: whether there is a perturbation to run at.
        cleaned: how many contexts ask for clean passes now.
    """

    def __init__(self) -> None:
        self.on = True
        self.cleaned = 0


class PerturbedFactor:
    """A parameter, and what is added to it where a forward pass reads it.

    Attributes:
        module, name: where the parameter is looked up.
        parameter: the parameter, the sharded one under FSDP2.
        E: the tensor that is added; whole, also where the parameter is sharded.
        average: the moving average that E is made of, often E itself.
        fitted_to: device and type of the parameter that E and the average were fitted to.
        ran_perturbed: whether a forward pass has used E since the last step.
        ran_clean: whether one with gradients has not, though its layer ran.
        refresh: called before E is used, to bring it up to date.
        was_swapped: tells whether the optimizer trains another parameter in its place now.
    """

    def __init__(self, module: nn.Module, name: str, E: Tensor, switch: Switch) -> None:
        self.module, self.name, self.switch = module, name, switch
        self.E = self.average = E
        parameter: Any = module._parameters[name]
        self.parameter, self.fitted_to = parameter, (parameter.device, parameter.dtype)
        self.ran_perturbed = self.ran_clean = False
        self.refresh: Callable[[PerturbedFactor], None] | None = None
        self.was_swapped: Callable[[PerturbedFactor], bool] = lambda factor: False

    def is_own(self, held: Any) -> bool:
        """Return whether a module's parameter is this one, or FSDP2's gathered form of it.

        Not what ``torch.func.functional_call`` puts there for a caller.
        """
        if held is self.parameter:
            return True
        if not isinstance(held, Parameter) or is_dtensor(held):
            return False
        return is_dtensor(self.parameter) or self.was_swapped(self)

    @property
    def only_clean(self) -> bool:
        """True if gradients are of the parameter itself.

        A layer that has not run here got its gradients from other ranks, where it ran perturbed;
        where there are none, from a library's kernel that takes its factors without running it.
        """
        return not self.ran_perturbed and (self.ran_clean or not has_ranks())

    def runs(self, layer: nn.Module, recomputed: bool) -> bool:
        """Return whether a pass of a layer is perturbed; recomputed passes follow the original."""
        if recomputed:
            return self.ran_perturbed
        return layer.training and self.switch.on and not self.switch.cleaned

    def fit(self, dtype: torch.dtype) -> None:
        """Move E and the average to the parameter's device, and give them a type."""
        E, average = self.E, self.average
        self.fitted_to = self.parameter.device, self.parameter.dtype
        self.E = E.to(self.parameter.device, dtype)
        self.average = self.E if average is E else average.to(self.E)

    def point(self, held: Tensor) -> Tensor:
        """Return ``held + E`` in the type of ``held``, which a float32 E may be wider than."""
        E = self.E
        if E.device != held.device:
            E = E.to(held.device)
        if type(held) is not Parameter and is_dtensor(held):
            E = laid_out_as(E, held)
        value = held + E
        return value if value.dtype == held.dtype else value.to(held.dtype)


# A module's ``__dict__``, a name in it, and what had the name before.
_Placed: TypeAlias = tuple[dict[str, Any], str, Any]


class Row(NamedTuple):
    """A factor, and one place below a layer where its parameter is held."""

    factor: PerturbedFactor
    module: nn.Module
    name: str
    path: str  # of the module, from the layer


class PerturbedLayer:
    """A LoRA layer, and the factors that are perturbed in it and in layers within it.

    Attributes:
        rows: the factors.
        waiting: called by the first training pass.
        forward: what stands in the place of the layer's forward pass.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.rows: list[Row] = []
        self.waiting: list[Callable[[], None]] = []
        self.wrap()

    def wrap(self) -> None:
        """Stand above whatever is the layer's forward pass now, a former one of this perhaps."""
        self.forward = LayerForward(self)
        self.layer.forward = self.forward
        self.layer.__dict__[_REPLICATE] = _Replicate(self)

    def unwrap(self) -> None:
        """Give the layer its own forward pass back, unless another library's lies above this."""
        own = self.layer.__dict__
        own.pop(_REPLICATE, None)
        while isinstance(top := own.get("forward"), LayerForward) and top.perturbed is self:
            if top.patched:
                own["forward"] = top.inner
            else:
                del own["forward"]

    def in_place(self) -> bool:
        """Return whether a call of the layer reaches this, below other libraries' or not."""
        function = self.layer.forward
        while function is not None and getattr(function, "perturbed", None) is not self:
            function = getattr(function, "__wrapped__", None)
        return function is not None


class LayerForward:
    """The forward pass of a layer, at perturbed factors.

    Attributes:
        inner: the forward pass that was there before.
    """

    def __init__(self, perturbed: PerturbedLayer) -> None:
        self.perturbed = perturbed
        self.patched = "forward" in perturbed.layer.__dict__  # by another library
        self.inner = self.__wrapped__ = perturbed.layer.forward  # the latter for inspect.signature
        self.__code__ = getattr(self.inner, "__code__", None)  # torch.export asks for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        perturbed = self.perturbed
        layer = perturbed.layer
        placed: list[_Placed] = []
        try:
            try:
                # A merged layer unmerges in its forward pass, by the factors it was merged with.
                if not (layer.disable_adapters or layer.merged):
                    self._place(layer, perturbed, placed)
                result = self.inner(*args, **kwargs)
                for own, name, _ in placed:
                    if type(one := own.get(name)) is OwnerForward and not one.ran:
                        one.factor.ran_clean |= torch.is_grad_enabled()
                return result
            finally:
                _take_away(placed)
        finally:
            if placed:  # a signal has ended the first one
                _take_away(placed)

    @staticmethod
    def _place(layer: Any, perturbed: PerturbedLayer, placed: list[_Placed]) -> None:
        compiling = torch.compiler.is_compiling()
        if perturbed.waiting and layer.training and not compiling:
            for claim in perturbed.waiting[:]:
                claim()
        # A pass that is computed again is perturbed as it was, whatever mode the layer is in now.
        recomputed = not compiling and recomputing()
        for factor, module, name, _ in perturbed.rows:
            if not factor.runs(layer, recomputed):
                factor.ran_clean |= torch.is_grad_enabled()
                continue
            own = module.__dict__
            held: Any = module._parameters.get(name)
            # By a pass around this one; an adapter that was deleted, or is not trained.
            if name in own or held is None or not held.requires_grad:
                continue
            if not factor.is_own(held):  # but a caller's own, in torch.func.functional_call
                continue
            if factor.refresh is not None and not compiling and not recomputed:
                factor.refresh(factor)
            if is_gathered_by(module, held):
                if _runs_owners(layer, module):
                    _put(own, "forward", OwnerForward(factor, module, name), placed)
                    continue
                held = module._parameters[name]  # which gathers it for this layer
            _put(own, name, factor.point(held), placed)
            factor.ran_perturbed = True

    def __reduce__(self) -> Any:
        # A copy of the layer, deep or from a pickle, runs its own forward pass, unperturbed; a
        # pickle does not need this package.
        if isinstance(self.inner, MethodType):
            return getattr, (self.inner.__self__, self.inner.__name__)
        return functools.partial, (self.inner,)


class OwnerForward:
    """The forward pass of a module within a layer, at its perturbed factor.

    It is there while the layer runs, for a factor that is whole while its own module runs alone.
    """

    def __init__(self, factor: PerturbedFactor, module: nn.Module, name: str) -> None:
        self.factor, self.module, self.name = factor, module, name
        self.inner = module.forward
        self.ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own, placed = self.module.__dict__, list[_Placed]()
        self.ran = True
        try:
            try:
                if self.name not in own:  # by a pass around this one
                    held: Any = self.module._parameters[self.name]
                    _put(own, self.name, self.factor.point(held), placed)
                    self.factor.ran_perturbed = True
                return self.inner(*args, **kwargs)
            finally:
                _take_away(placed)
        finally:
            if placed:  # a signal has ended the first one
                _take_away(placed)


class _Replicate:
    """Copy a layer for ``torch.nn.DataParallel``, whose replicas hold tensors, not parameters."""

    def __init__(self, perturbed: PerturbedLayer) -> None:
        self.perturbed = perturbed

    def __call__(self) -> Any:
        layer, rows = self.perturbed.layer, self.perturbed.rows
        for factor, *_ in rows:  # here, since replicas run in threads
            if factor.refresh is not None and layer.training:
                factor.refresh(factor)
        replica = type(layer)._replicate_for_data_parallel(layer)
        inner = self.perturbed.forward.inner
        inner = getattr(inner, "__func__", inner).__get__(replica)

        def forward(*args: Any, **kwargs: Any) -> Any:
            recomputed, replaced = recomputing(), []
            for factor, _, name, path in rows:
                own = replica.get_submodule(path).__dict__
                if not (layer.disable_adapters or layer.merged) and factor.runs(layer, recomputed):
                    replaced.append((own, name, own[name]))
                    own[name] = factor.point(own[name])
                    factor.ran_perturbed = True
            try:
                return inner(*args, **kwargs)
            finally:
                for own, name, value in replaced:
                    own[name] = value

        replica.forward = forward
        return replica

    def __reduce__(self) -> Any:
        return getattr, (self.perturbed.layer, _REPLICATE)


def _runs_owners(layer: Any, module: nn.Module) -> bool:
    """Return whether a layer runs the module that owns a factor, rather than reading its weight."""
    experts = hasattr(layer, "parameter_name")  # of a parameter that PEFT wraps
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) and not experts


def _put(own: dict[str, Any], name: str, value: Any, placed: list[_Placed]) -> None:
    """Put a value into a module's ``__dict__``, and note what was there."""
    placed.append((own, name, own.get(name)))
    own[name] = value


def _take_away(placed: list[_Placed]) -> None:
    while placed:
        own, name, before = placed[-1]
        if before is None:
            own.pop(name, None)
        else:
            own[name] = before
        placed.pop()


def recomputing() -> bool:
    """Return whether a backward pass computes something again: activation checkpointing.

    Backward hooks that call a model run in backward passes, too, but without gradients.
    """
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


def has_ranks() -> bool:
    """Return whether other processes train with this one."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


# By the layer's id: a layer holds its own, in its forward pass.
_perturbed: weakref.WeakValueDictionary[int, PerturbedLayer] = weakref.WeakValueDictionary()


def perturbed_layer(layer: nn.Module) -> PerturbedLayer:
    """Return the layer's :class:`PerturbedLayer`, made if there is none."""
    found = _perturbed.get(id(layer))
    if found is None or found.layer is not layer:
        found = _perturbed[id(layer)] = PerturbedLayer(layer)
        _let_checkpoints_compile()
    return found


def detach(
    layers: Iterable[PerturbedLayer], factors: Iterable[PerturbedFactor], claim: Any = None
) -> None:
    """Perturb these factors no more, wait for this claim no more; unwrap layers left with none."""
    gone = set(map(id, factors))
    for one in layers:
        one.rows = [row for row in one.rows if id(row.factor) not in gone]
        one.waiting = [waiting for waiting in one.waiting if waiting is not claim]
        if not (one.rows or one.waiting):
            _perturbed.pop(id(one.layer), None)
            one.unwrap()


def _let_checkpoints_compile() -> None:
    # Within torch.utils.checkpoint compiled code may otherwise not set an attribute of a module.
    # PEFT has imported Dynamo already; nothing that compiles today is compiled otherwise.
    from torch._dynamo import config

    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
