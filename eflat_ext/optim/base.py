"""The base of the three optimizers: a real ``torch.optim.Optimizer`` around another one.

Parameter groups and state are the base optimizer's own; all that changes besides lies in the
perturbation, which wrappers that copy an optimizer's attributes (Lightning, Fabric) share with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from eflat_ext.lora import LoraPair
from eflat_ext.perturbation.base import Perturbation
from eflat_ext.perturbation.checkpoint import pack, unpack
from eflat_ext.perturbation.settings import Rho


class PerturbingOptimizer(Optimizer):
    """Base class: wraps ``base`` and perturbs factors of a model's pairs for its gradients.

    Learning rate schedulers, step hooks, gradient scalers and the profiler treat it as any
    optimizer; attributes that it does not have are the base optimizer's. It cannot be copied or
    pickled: save :meth:`state_dict` and construct it anew.

    Attributes:
        base: the wrapped optimizer.
        perturbation: what is added to the factors in training forward passes.
    """

    # A fused base would unscale gradients itself, after they have been looked at.
    _step_supports_amp_scaling = False

    def __init__(self, perturbation: Perturbation, base: Optimizer) -> None:
        self.base = base
        self.perturbation = perturbation
        # Optimizer.__init__ would make groups and state of its own; this sets the hooks alone.
        self.__setstate__({})
        try:
            perturbation.claim(base)
        except BaseException:
            perturbation.remove()  # whoever holds the exception would let it wait for a pass
            raise
        perturbation.optimizers.add(self)

    # The base optimizer's own groups, state and defaults: it rebinds them when it loads.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's parameter groups; ``"perturbation_rho"`` shows rho."""
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("base", "perturbation"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its parameters are trained, not perturbed."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        self.base.zero_grad(set_to_none)

    def train(self) -> None:
        """Call the base optimizer's ``train``, if it has one (schedule-free optimizers do)."""
        getattr(self.base, "train", lambda: None)()

    def eval(self) -> None:
        """Call the base optimizer's ``eval``, if it has one."""
        getattr(self.base, "eval", lambda: None)()

    def _step_base(self, closure: Callable[[], Any] | None = None) -> None:
        """Step the base optimizer; hooks of all optimizers' steps run for this one's step alone.

        Args:
            closure: returns the loss that there is already, for bases that use it.
        """
        parameters = inspect.signature(self.base.step).parameters if closure is not None else {}
        args = (self.base, closure) if "closure" in parameters else (self.base,)
        step = type(self.base).step
        # A scheduler's patch of the instance, or a class that torch has not wrapped:
        if "step" in vars(self.base) or not getattr(step, "hooked", False):
            self.base.step(*args[1:])
            return
        for before in self.base._optimizer_step_pre_hooks.values():
            before(self.base, args, {})
        step.__wrapped__(*args)  # type: ignore[attr-defined]
        for after in self.base._optimizer_step_post_hooks.values():
            after(self.base, args, {})

    # The perturbation.

    @property
    def pairs(self) -> list[LoraPair]:
        """The LoRA pairs that are perturbed."""
        return self.perturbation.pairs

    @property
    def rho(self) -> Rho:
        """Radius of the perturbation: a number, or a callable of the completed steps."""
        return self.perturbation.rho

    @rho.setter
    def rho(self, rho: Rho) -> None:
        self.perturbation.rho = rho

    @property
    def norm_scope(self) -> str:
        """Scope of rho: "layer" (each pair) or "global" (all pairs together)."""
        return self.perturbation.norm_scope

    @property
    def skipped_perturbations(self) -> Tensor:
        """See :attr:`eflat_ext.EFlatPerturbation.skipped`."""
        return self.perturbation.skipped

    @property
    def perturbation_norms(self) -> dict[str, Tensor]:
        """See :attr:`eflat_ext.EFlatPerturbation.norms`."""
        return self.perturbation.norms

    def points(self) -> dict[Tensor, Tensor]:
        """Return the pairs' factors where the next gradients will be taken: copies, whole."""
        return self.perturbation.points()

    def clean(self) -> AbstractContextManager[None]:
        """Make a context in which training passes are not perturbed."""
        return self.perturbation.clean()

    def remove_hooks(self) -> None:
        """Take everything off the model, for good: see :meth:`eflat_ext.EFlatPerturbation.remove`.

        Nothing needs it: a newer optimizer of the same weights takes over by itself.
        """
        self.perturbation.remove()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, with the averages and counters; ``rho`` is not in it.

        ``state`` holds each average as ``"perturbation_ema"`` beside its factor's own entries; each
        group holds ``"perturbation_steps"`` and ``"perturbation_skipped"``, two ints. Where the
        base has a format of its own, one entry ``"perturbation"`` holds all of that.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        packed = pack(self.perturbation, self.base, self.base.state_dict())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        A state without averages, such as the plain base optimizer's, loads with zeros.

        Raises:
            ValueError: groups, shapes or the parameters that have an average do not match, or an
                average is not finite; nothing has been loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        rest, load = unpack(self.perturbation, self.base, state_dict)
        self.base.load_state_dict(rest)
        load()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, it is tied to its model: save its "
            "state_dict() and construct it on the other model"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self.rho!r}, pairs={len(self.pairs)}, {self.base!r})"
