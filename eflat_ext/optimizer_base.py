"""What the three optimizers share: a real ``torch.optim.Optimizer`` around another one.

Parameter groups and state are the base optimizer's own. This class adds the pairs whose weights
are perturbed, the perturbation's life cycle, its radius, its counters and its checkpoint entries.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .additions import Addition
from .dtensors import fsdp_modules, laid_out_as, local, refuse_flat_parameters, reshard
from .engines import check_own_parameters
from .optimizer_arguments import (
    AVERAGE,
    check_base,
    check_one_device,
    check_saved_averages,
    number,
)
from .pairs import Slot, adding_modules, find_pairs, merging_layers, reads_outside
from .perturbed import PerturbedWeights
from .sharded import Sharding
from .stacklevel import stacklevel_of_user
from .targets import parameters_of, perturbed_pairs

Rho: TypeAlias = float | Callable[[int], float]

# Names in state_dict() of the counters in each group.
_STEPS, _SKIPPED = "perturbation_steps", "perturbation_skipped"


class PairList(NamedTuple):
    """The arguments of the operators for some pairs: factors, gradients, scalings.

    Factors and gradients are matrices; the parameters that they are views of have other shapes
    in convolutions, and several pairs in experts.
    """

    indices: list[int]
    A: list[Tensor]
    B: list[Tensor]
    grad_A: list[Tensor]
    grad_B: list[Tensor]
    scaling: list[float]
    parameters_A: list[Tensor]
    parameters_B: list[Tensor]


class PerturbingOptimizer(Optimizer):
    """Base class: wraps ``base`` and perturbs ``factors`` ("A", "B" or both) of a model's pairs.

    Learning rate schedulers, step hooks, gradient scalers and the profiler treat it as any
    optimizer. It cannot be copied or pickled: save :meth:`state_dict` and construct it anew.

    Attributes:
        base: the wrapped optimizer.
        pairs: the LoRA pairs that are perturbed.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        *,
        rho: Rho,
        norm_scope: str,
        factors: Sequence[str],
        together: bool = False,
    ) -> None:
        if isinstance(base, PerturbingOptimizer):
            raise TypeError(f"base: expected a plain optimizer, got {type(base).__name__}")
        check_base(base)
        if norm_scope not in ("layer", "global"):
            raise ValueError(f'norm_scope: expected "layer" or "global", got {norm_scope!r}')
        if isinstance(model, nn.Module):
            refuse_flat_parameters(model)
            reshard(fsdp_modules(model))
        self.base = base
        self._norm_scope = norm_scope
        self.pairs, slots, self._target_of = perturbed_pairs(
            find_pairs(model), base, factors, together
        )
        check_one_device(self.pairs)
        Sharding.of(self.pairs)  # refuses what it cannot handle
        # Optimizer.__init__ would make groups and state of its own; this sets the hooks alone.
        self.__setstate__({})
        self._targets: list[Slot] = slots
        self._steps = 0
        device = getattr(*slots[0]).device
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._norms: tuple[list[int], Tensor] = ([], torch.zeros(0, device=device))
        self._zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._warned_clean = False
        self._weights: PerturbedWeights
        self._rho = rho
        self._rho_now(rho)

    def _perturb_with(self, model: nn.Module, perturbation: Addition) -> None:
        merging = merging_layers(model)
        layers = list(dict.fromkeys(pair.layer for pair in self.pairs))
        guarded = [
            (layer, name)
            for layer in dict.fromkeys([*layers, *merging])
            for name in ("merge", "unmerge")
        ]
        guarded += [
            (tuner, name)
            for tuner in adding_modules(model)
            for name in ("add_weighted_adapter", "inject_adapter")
        ]
        self._weights = PerturbedWeights(
            model,
            self._targets,
            perturbation,
            self,
            guarded,
            [(layer, "get_delta_weight") for layer in layers if reads_outside(layer)],
            merging,
            perturbation.idle,
            layers,
        )

    # The base optimizer's own groups, state and defaults: it rebinds them when it loads.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state by parameter."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its parameters are trained, not perturbed."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        self.base.zero_grad(set_to_none)

    # The perturbation.

    @property
    def rho(self) -> Rho:
        """Radius of the perturbation: a number, or a callable of the completed steps."""
        return self._rho

    @rho.setter
    def rho(self, rho: Rho) -> None:
        self._rho_now(rho)
        self._rho = rho
        self._rho_changed()

    @property
    def norm_scope(self) -> str:
        """Whether rho is the radius of every pair, "layer", or of all together, "global"."""
        return self._norm_scope

    @property
    def skipped_perturbations(self) -> Tensor:
        """How many times a layer got no new perturbation: its norm was zero or not finite.

        An int64 tensor without dimensions on the parameters' device; reading its value waits.
        """
        return self._skipped

    @property
    def perturbation_norms(self) -> dict[str, Tensor]:
        """Norm of each pair's gradient at its last step, before rho; tensors without dimensions.

        By pair name; pairs without a gradient at that step are missing.
        """
        indices, norms = self._norms
        return {self.pairs[i].name: norm for i, norm in zip(indices, norms.unbind(), strict=True)}

    def train(self) -> None:
        """Perturb the weights now, if a perturbation is due (idempotent).

        With hooks on the model, which is the default, its training forward passes do this. Before
        compiled calls of other methods than ``forward``, and such calls of a model that is sharded
        by FSDP2, it is due at every step.
        """
        if self._weights.enabled:
            self._weights.perturb()
            self._weights.watch_gradients()
            self._weights.visited |= not self._weights.alive

    def eval(self) -> None:
        """Restore the clean weights now (idempotent)."""
        self._weights.restore()

    def clean(self) -> AbstractContextManager[None]:
        """A context in which the weights are clean, whatever runs there."""
        return self._weights.clean()

    def remove_hooks(self) -> None:
        """Restore the clean weights and take every hook off the model.

        From then on :meth:`train` and :meth:`eval` perturb and restore; between them,
        ``state_dict`` of the model holds perturbed weights.
        """
        self._weights.remove()

    def _rho_changed(self) -> None:
        """For methods whose training forward passes need rho."""

    def _rho_now(self, rho: Rho | None = None) -> float:
        rho = self._rho if rho is None else rho
        value = rho(self._steps) if callable(rho) else rho
        radius = number(value)
        if not math.isfinite(radius) or radius < 0:
            raise ValueError(
                f"rho: expected a finite number >= 0 or a callable of the step, got {value!r}"
            )
        return radius

    def _with_gradients(self) -> PairList:
        """The pairs that have a gradient and a scaling; a factor without a gradient gets zeros."""
        rows = PairList([], [], [], [], [], [], [], [])
        for index, pair in enumerate(self.pairs):
            scaling = pair.scaling
            if scaling == 0:
                continue
            if not pair.has_gradient:
                continue
            A, B = pair.parameter_A, pair.parameter_B
            rows.indices.append(index)
            rows.A.append(pair.A)
            rows.B.append(pair.B)
            rows.grad_A.append(pair.part("A", self._gradient(A)).flatten(1))
            rows.grad_B.append(pair.part("B", self._gradient(B)).flatten(1))
            rows.scaling.append(scaling)
            rows.parameters_A.append(A)
            rows.parameters_B.append(B)
        return rows

    def _gradient(self, parameter: Tensor) -> Tensor:
        if parameter.grad is None:
            return self._no_gradient(parameter)
        return parameter.grad.to(parameter.dtype)  # another by the parameter's grad_dtype

    def _no_gradient(self, factor: Tensor) -> Tensor:
        key = (factor.device, factor.dtype)
        if key not in self._zeros:
            self._zeros[key] = torch.zeros((), dtype=factor.dtype, device=factor.device)
        return self._zeros[key].expand(factor.shape)

    def _skipped_on(self, device: torch.device) -> Tensor:
        if self._skipped.device != device:
            self._skipped = self._skipped.to(device)
        return self._skipped

    def _sharding(self) -> tuple[Sharding, list[int]] | None:
        """How factors are sharded, and all pairs with a scaling; None if nothing is sharded.

        Every rank has to name the same pairs, whatever gradients it has.

        Raises:
            RuntimeError: the base optimizer has other parameters than the model.
        """
        check_own_parameters(self.base, self._weights.targets())
        indices = [i for i, pair in enumerate(self.pairs) if pair.scaling != 0]
        sharding = Sharding.of([self.pairs[i] for i in indices])
        return None if sharding is None else (sharding, indices)

    def _has_gradients(self) -> bool:
        """Whether any pair with a scaling has a gradient."""
        # In this order: a deleted adapter has no scaling, and perhaps no factors any more.
        return any(pair.scaling != 0 and pair.has_gradient for pair in self.pairs)

    def _keep_norms(self, indices: list[int], norms: Tensor) -> None:
        """Remember the norms of those pairs that have a gradient."""
        having = [at for at, index in enumerate(indices) if self.pairs[index].has_gradient]
        self._norms = ([indices[at] for at in having], norms[having])

    def _warn_clean_gradient(self) -> None:
        if not self._warned_clean:
            self._warned_clean = True
            warnings.warn(
                "the gradient of this step was taken without the perturbation: no forward pass of "
                "the model ran in training mode (model.train()), nor optimizer.train(), which "
                "compiled or sharded calls of other methods than forward need",
                UserWarning,
                stacklevel=stacklevel_of_user(),
            )

    # Checkpoints.

    def _averages(self) -> list[Tensor]:
        """Moving averages to be saved, one per target; none where a method has no memory."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with the averages and counters; ``rho`` is not in it.

        ``state`` holds each average as ``"perturbation_ema"`` beside its target's own entries;
        each group holds ``"perturbation_steps"`` and ``"perturbation_skipped"``, two ints.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = dict(self.base.state_dict())
        counters = {_STEPS: self._steps, _SKIPPED: int(self._skipped)}
        packed["param_groups"] = [{**group, **counters} for group in packed["param_groups"]]
        packed["state"] = dict(packed["state"])
        for key, average in zip(self._keys(packed["param_groups"]), self._averages(), strict=False):
            if key is None:
                continue  # the base optimizer no longer trains it
            packed["state"][key] = {**packed["state"].get(key, {}), AVERAGE: average}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore clean weights, then load what :meth:`state_dict` gave.

        A state without averages, such as the plain base optimizer's, loads with zeros.

        Raises:
            ValueError: groups, shapes or the parameters that have an average do not match, or an
                average is not finite; nothing has been loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups = [dict(group) for group in state_dict["param_groups"]]
        steps, skipped = (
            next((group[key] for group in groups if key in group), 0) for key in (_STEPS, _SKIPPED)
        )
        for group in groups:
            group.pop(_STEPS, None)
            group.pop(_SKIPPED, None)
        state: dict[Any, Any] = {}
        saved: dict[Any, Tensor] = {}
        for key, entry in state_dict["state"].items():
            if isinstance(entry, dict) and AVERAGE in entry:
                saved[key] = entry[AVERAGE]
                entry = {name: value for name, value in entry.items() if name != AVERAGE}
                if not entry:  # many optimizers take any entry for their own, complete state
                    continue
            state[key] = entry
        averages = self._averages()
        keys = self._keys(groups)[: len(averages)]
        if averages and saved:
            check_saved_averages(saved, keys, averages)
        values = [saved.get(key) for key in keys]
        self.eval()
        self._weights.settle()
        self.base.load_state_dict({**state_dict, "state": state, "param_groups": groups})
        # Copied in place: the base class would cast them to the parameter's type.
        for average, value in zip(averages, values, strict=True):
            shard = local(average)
            shard.zero_() if value is None else shard.copy_(local(laid_out_as(value, average)))
        self._steps = int(steps)
        self._skipped.fill_(int(skipped))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _keys(self, groups: Sequence[dict[str, Any]]) -> list[Any]:
        """The targets' keys in the groups of a state; None where they have no such parameter."""
        trained = parameters_of(self.param_groups)
        keys = dict(zip(map(id, trained), parameters_of(groups), strict=False))
        return [keys.get(id(target)) for target in self._weights.targets()]

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, it is tied to its model: save its "
            "state_dict() and construct it on the other model"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self._rho!r}, pairs={len(self.pairs)}, {self.base!r})"
